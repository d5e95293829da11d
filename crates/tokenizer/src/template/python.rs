//! Values written as Python writes them: `str()` and `json.dumps()`.

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Error, ErrorKind, State, Value};
use serde_json::Value as Json;

/// Deeper values are refused; messages with tools nest about ten deep.
const MAX_DEPTH: usize = 64;

/// The value as Python prints it: `True`, `None`, `['a', 1.0]`.
pub(super) fn text(state: &State, value: &Value) -> Result<String, Error> {
    match value.kind() {
        ValueKind::Undefined => Ok(String::new()),
        ValueKind::Bool | ValueKind::None | ValueKind::Number | ValueKind::Seq | ValueKind::Map => {
            let mut out = String::new();
            repr(&plain(state, value, 0)?, &mut out);
            Ok(out)
        }
        _ => Ok(value.to_string()),
    }
}

fn repr(value: &Json, out: &mut String) {
    match value {
        Json::Null => out.push_str("None"),
        Json::Bool(true) => out.push_str("True"),
        Json::Bool(false) => out.push_str("False"),
        Json::Number(n) => number(n, out),
        Json::String(s) => {
            let quote = if s.contains('\'') && !s.contains('"') { '"' } else { '\'' };
            out.push(quote);
            for c in s.chars() {
                match c {
                    '\\' => out.push_str("\\\\"),
                    '\n' => out.push_str("\\n"),
                    '\r' => out.push_str("\\r"),
                    '\t' => out.push_str("\\t"),
                    c if c == quote => out.extend(['\\', c]),
                    c => out.push(c),
                }
            }
            out.push(quote);
        }
        Json::Array(list) => {
            out.push('[');
            for (i, item) in list.iter().enumerate() {
                out.push_str(if i > 0 { ", " } else { "" });
                repr(item, out);
            }
            out.push(']');
        }
        Json::Object(map) => {
            out.push('{');
            for (i, (key, item)) in map.iter().enumerate() {
                out.push_str(if i > 0 { ", " } else { "" });
                repr(&Json::String(key.clone()), out);
                out.push_str(": ");
                repr(item, out);
            }
            out.push('}');
        }
    }
}

/// The value as `json.dumps` writes it, with transformers' defaults: no escapes for characters
/// outside ASCII or for HTML, `, ` and `: ` as separators, keys in their order.
pub(super) fn json(state: &State, value: &Value, args: &Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = args.get("indent")?;
    let separators: Option<Vec<String>> = args.get("separators")?;
    let style = Style {
        ascii: args.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        sort: args.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
        indent,
        item: if indent.is_some() { "," } else { ", " }.to_string(),
        key: ": ".to_string(),
    };
    let style = match separators.as_deref() {
        None => style,
        Some([item, key]) => Style { item: item.clone(), key: key.clone(), ..style },
        Some(_) => {
            let what = "tojson: separators must be two texts";
            return Err(Error::new(ErrorKind::InvalidOperation, what));
        }
    };
    if indent.is_some_and(|n| n > 64) || style.item.len() + style.key.len() > 64 {
        return Err(Error::new(ErrorKind::InvalidOperation, "tojson: indent or separators too long"));
    }
    let plain = plain(state, value, 0)?;
    let mut out = String::new();
    style.write(&plain, 0, &mut out);
    state.consume_fuel(out.len() as u64 / 4)?;
    Ok(out)
}

struct Style {
    ascii: bool,
    sort: bool,
    indent: Option<usize>,
    item: String,
    key: String,
}

impl Style {
    fn line(&self, depth: usize, out: &mut String) {
        if let Some(indent) = self.indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', indent * depth));
        }
    }

    fn write(&self, value: &Json, depth: usize, out: &mut String) {
        match value {
            Json::Null => out.push_str("null"),
            Json::Bool(b) => out.push_str(if *b { "true" } else { "false" }),
            Json::Number(n) => number(n, out),
            Json::String(s) => self.string(s, out),
            Json::Array(list) if list.is_empty() => out.push_str("[]"),
            Json::Object(map) if map.is_empty() => out.push_str("{}"),
            Json::Array(list) => {
                out.push('[');
                for (i, item) in list.iter().enumerate() {
                    out.push_str(if i > 0 { &self.item } else { "" });
                    self.line(depth + 1, out);
                    self.write(item, depth + 1, out);
                }
                self.line(depth, out);
                out.push(']');
            }
            Json::Object(map) => {
                let mut items: Vec<_> = map.iter().collect();
                if self.sort {
                    items.sort_by(|a, b| a.0.cmp(b.0));
                }
                out.push('{');
                for (i, (key, item)) in items.into_iter().enumerate() {
                    out.push_str(if i > 0 { &self.item } else { "" });
                    self.line(depth + 1, out);
                    self.string(key, out);
                    out.push_str(&self.key);
                    self.write(item, depth + 1, out);
                }
                self.line(depth, out);
                out.push('}');
            }
        }
    }

    fn string(&self, text: &str, out: &mut String) {
        out.push('"');
        for c in text.chars() {
            match c {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{c}' => out.push_str("\\f"),
                c if c < ' ' || (self.ascii && c >= '\u{7f}' && c != '\u{7f}') => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        out.push_str(&format!("\\u{unit:04x}"));
                    }
                }
                c => out.push(c),
            }
        }
        out.push('"');
    }
}

/// Python's `repr` of a number: the shortest digits that read back as the same float, with an
/// exponent below 1e-4 and from 1e16 on.
fn number(n: &serde_json::Number, out: &mut String) {
    if !n.is_f64() {
        out.push_str(&n.to_string());
        return;
    }
    let x = n.as_f64().unwrap_or(f64::NAN);
    if x == 0.0 || (1e-4..1e16).contains(&x.abs()) {
        let text = x.to_string();
        out.push_str(&text);
        if !text.contains('.') {
            out.push_str(".0");
        }
    } else {
        let text = format!("{x:e}");
        let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
        let (sign, exponent) = match exponent.strip_prefix('-') {
            Some(rest) => ('-', rest),
            None => ('+', exponent),
        };
        out.push_str(&format!("{digits}e{sign}{exponent:0>2}"));
    }
}

/// The value as JSON, with its depth bounded and each element paid for.
fn plain(state: &State, value: &Value, depth: usize) -> Result<Json, Error> {
    if depth > MAX_DEPTH {
        let what = format!("a value nests more than {MAX_DEPTH} deep");
        return Err(Error::new(ErrorKind::InvalidOperation, what));
    }
    state.consume_fuel(1)?;
    Ok(match value.kind() {
        ValueKind::Undefined | ValueKind::None => Json::Null,
        ValueKind::Bool => Json::Bool(value.is_true()),
        ValueKind::String => {
            let text = value.as_str().unwrap_or_default();
            state.consume_fuel(text.len() as u64 / 64)?;
            Json::String(text.to_string())
        }
        ValueKind::Seq | ValueKind::Iterable => {
            let items = value.try_iter()?.map(|item| plain(state, &item, depth + 1));
            Json::Array(items.collect::<Result<_, _>>()?)
        }
        ValueKind::Map => {
            let mut map = serde_json::Map::new();
            for key in value.try_iter()? {
                let item = plain(state, &value.get_item(&key)?, depth + 1)?;
                let name = key.as_str().map_or_else(|| key.to_string(), str::to_string);
                map.insert(name, item);
            }
            Json::Object(map)
        }
        _ => serde_json::to_value(value).map_err(|e| {
            Error::new(ErrorKind::BadSerialization, format!("cannot be written as JSON: {e}"))
        })?,
    })
}
