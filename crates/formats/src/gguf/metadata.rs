//! The keys and values of a GGUF file.

use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};

use crate::Error;

/// A metadata value, with GGUF's types.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)] // the names are the types
pub enum Value {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    String(String),
    Array(Array),
    U64(u64),
    I64(i64),
    F64(f64),
}

/// A list of values of one type.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)]
pub enum Array {
    U8(Vec<u8>),
    I8(Vec<i8>),
    U16(Vec<u16>),
    I16(Vec<i16>),
    U32(Vec<u32>),
    I32(Vec<i32>),
    F32(Vec<f32>),
    Bool(Vec<bool>),
    String(Vec<String>),
    Array(Vec<Array>),
    U64(Vec<u64>),
    I64(Vec<i64>),
    F64(Vec<f64>),
}

/// Does `$body` with `$v` bound to the vector of whatever type the array has.
macro_rules! each_array {
    ($array:expr, $v:ident => $body:expr) => {
        match $array {
            Array::U8($v) => $body,
            Array::I8($v) => $body,
            Array::U16($v) => $body,
            Array::I16($v) => $body,
            Array::U32($v) => $body,
            Array::I32($v) => $body,
            Array::F32($v) => $body,
            Array::Bool($v) => $body,
            Array::String($v) => $body,
            Array::Array($v) => $body,
            Array::U64($v) => $body,
            Array::I64($v) => $body,
            Array::F64($v) => $body,
        }
    };
}

impl Array {
    /// Number of elements.
    pub fn len(&self) -> usize {
        each_array!(self, v => v.len())
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The elements' type as messages name it.
    fn type_name(&self) -> &'static str {
        match self {
            Array::U8(_) => "u8",
            Array::I8(_) => "i8",
            Array::U16(_) => "u16",
            Array::I16(_) => "i16",
            Array::U32(_) => "u32",
            Array::I32(_) => "i32",
            Array::F32(_) => "f32",
            Array::Bool(_) => "bool",
            Array::String(_) => "string",
            Array::Array(_) => "array",
            Array::U64(_) => "u64",
            Array::I64(_) => "i64",
            Array::F64(_) => "f64",
        }
    }

    /// The elements as whole numbers, whichever integer type they have.
    fn integers(&self) -> Option<Vec<i64>> {
        match self {
            Array::U8(v) => Some(v.iter().map(|&x| x.into()).collect()),
            Array::I8(v) => Some(v.iter().map(|&x| x.into()).collect()),
            Array::U16(v) => Some(v.iter().map(|&x| x.into()).collect()),
            Array::I16(v) => Some(v.iter().map(|&x| x.into()).collect()),
            Array::U32(v) => Some(v.iter().map(|&x| x.into()).collect()),
            Array::I32(v) => Some(v.iter().map(|&x| x.into()).collect()),
            Array::U64(v) => v.iter().map(|&x| x.try_into().ok()).collect(),
            Array::I64(v) => Some(v.clone()),
            Array::F32(_) | Array::F64(_) | Array::Bool(_) | Array::String(_) | Array::Array(_) => None,
        }
    }
}

impl Value {
    /// As messages name it.
    fn type_name(&self) -> String {
        match self {
            Value::U8(_) => "u8".into(),
            Value::I8(_) => "i8".into(),
            Value::U16(_) => "u16".into(),
            Value::I16(_) => "i16".into(),
            Value::U32(_) => "u32".into(),
            Value::I32(_) => "i32".into(),
            Value::F32(_) => "f32".into(),
            Value::Bool(_) => "bool".into(),
            Value::String(_) => "string".into(),
            Value::Array(a) => format!("array of {} {}", a.len(), a.type_name()),
            Value::U64(_) => "u64".into(),
            Value::I64(_) => "i64".into(),
            Value::F64(_) => "f64".into(),
        }
    }

    /// The value as a whole number, whichever integer type it has.
    fn integer(&self) -> Option<i128> {
        match *self {
            Value::U8(x) => Some(x.into()),
            Value::I8(x) => Some(x.into()),
            Value::U16(x) => Some(x.into()),
            Value::I16(x) => Some(x.into()),
            Value::U32(x) => Some(x.into()),
            Value::I32(x) => Some(x.into()),
            Value::U64(x) => Some(x.into()),
            Value::I64(x) => Some(x.into()),
            Value::F32(_) | Value::F64(_) | Value::Bool(_) | Value::String(_) | Value::Array(_) => None,
        }
    }
}

/// Scalars as they are, strings quoted; of a long array its length and first elements.
impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Value::U8(x) => x.fmt(f),
            Value::I8(x) => x.fmt(f),
            Value::U16(x) => x.fmt(f),
            Value::I16(x) => x.fmt(f),
            Value::U32(x) => x.fmt(f),
            Value::I32(x) => x.fmt(f),
            Value::F32(x) => x.fmt(f),
            Value::Bool(x) => x.fmt(f),
            Value::String(x) => write!(f, "{x:?}"),
            Value::Array(a) => a.fmt(f),
            Value::U64(x) => x.fmt(f),
            Value::I64(x) => x.fmt(f),
            Value::F64(x) => x.fmt(f),
        }
    }
}

impl fmt::Display for Array {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        /// Elements that `info` shows.
        const SHOWN: usize = 6;
        write!(f, "{} {} [", self.len(), self.type_name())?;
        each_array!(self, v => for (i, x) in v.iter().take(SHOWN).enumerate() {
            write!(f, "{}{x:?}", if i > 0 { ", " } else { "" })?;
        });
        f.write_str(if self.len() > SHOWN { ", ..]" } else { "]" })
    }
}

/// Keys and values in the file's order.
///
/// The typed getters come in pairs: `u32("k")` is an error if `k` is missing, `opt_u32("k")` is `None` then. Both are
/// an error if the value has another type. Any integer type serves for an integer that it can hold.
///
/// ```
/// use sparsam_formats::gguf::{Metadata, Value};
/// let mut m = Metadata::default();
/// m.insert("llama.block_count", Value::U32(30));
/// assert_eq!(m.usize("llama.block_count").unwrap(), 30);
/// assert_eq!(m.opt_f32("llama.rope.freq_base").unwrap(), None);
/// assert!(m.str("llama.block_count").unwrap_err().to_string().contains("is u32 30, where a string is expected"));
/// ```
#[derive(Clone, Debug, Default)]
pub struct Metadata {
    /// The file it came from, for messages.
    path: PathBuf,
    entries: Vec<(String, Value)>,
    index: HashMap<String, usize>,
}

/// Same keys and values in the same order; whichever file they came from.
impl PartialEq for Metadata {
    fn eq(&self, other: &Metadata) -> bool {
        self.entries == other.entries
    }
}

/// A required getter made from the optional one.
macro_rules! required {
    ($(#[$doc:meta] $name:ident, $opt:ident -> $t:ty;)*) => {$(
        #[$doc]
        ///
        /// # Errors
        /// If the key is missing or has another type.
        pub fn $name(&self, key: &str) -> Result<$t, Error> {
            self.$opt(key)?.ok_or_else(|| self.key_error(key, "is missing"))
        }
    )*};
}

impl Metadata {
    pub(crate) fn new(path: &Path) -> Metadata {
        Metadata { path: path.to_path_buf(), ..Metadata::default() }
    }

    /// Number of keys.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is no key.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Keys and values in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &Value)> {
        self.entries.iter().map(|(k, v)| (k.as_str(), v))
    }

    /// The value of `key`.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.index.get(key).map(|&i| &self.entries[i].1)
    }

    /// Sets `key`, in its place if it is there and at the end otherwise; returns the value that was there.
    pub fn insert(&mut self, key: impl Into<String>, value: Value) -> Option<Value> {
        let key = key.into();
        if let Some(&i) = self.index.get(&key) {
            return Some(std::mem::replace(&mut self.entries[i].1, value));
        }
        self.index.insert(key.clone(), self.entries.len());
        self.entries.push((key, value));
        None
    }

    /// Takes `key` out.
    pub fn remove(&mut self, key: &str) -> Option<Value> {
        let i = self.index.remove(key)?;
        let (_, value) = self.entries.remove(i);
        self.index.values_mut().filter(|j| **j > i).for_each(|j| *j -= 1);
        Some(value)
    }

    /// An error about `key` for a caller who finds that its value makes no sense; `problem` continues "key K ...".
    pub fn key_error(&self, key: &str, problem: impl Into<String>) -> Error {
        Error::Key { path: self.path.clone(), key: key.to_string(), problem: problem.into() }
    }

    fn wrong(&self, key: &str, value: &Value, want: &str) -> Error {
        let shown = match value {
            Value::Array(a) => a.to_string(),
            other => format!("{} {other}", other.type_name()),
        };
        self.key_error(key, format!("is {shown}, where {want} is expected"))
    }

    /// The value of `key` through `f`, which gives `None` for a value of the wrong type.
    fn typed<'a, T>(
        &'a self,
        key: &str,
        want: &str,
        f: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, Error> {
        match self.get(key) {
            None => Ok(None),
            Some(value) => f(value).map(Some).ok_or_else(|| self.wrong(key, value, want)),
        }
    }

    /// A whole number from 0 to 2^32 - 1, if the key is there.
    pub fn opt_u32(&self, key: &str) -> Result<Option<u32>, Error> {
        self.typed(key, "a whole number below 2^32", |v| v.integer()?.try_into().ok())
    }

    /// A whole number from 0, if the key is there.
    pub fn opt_usize(&self, key: &str) -> Result<Option<usize>, Error> {
        self.typed(key, "a whole number from 0", |v| v.integer()?.try_into().ok())
    }

    /// A number (f32, or f64 rounded to it), if the key is there.
    pub fn opt_f32(&self, key: &str) -> Result<Option<f32>, Error> {
        self.typed(key, "a number", |v| match *v {
            Value::F32(x) => Some(x),
            Value::F64(x) => Some(x as f32),
            _ => None,
        })
    }

    /// Yes or no, if the key is there.
    pub fn opt_bool(&self, key: &str) -> Result<Option<bool>, Error> {
        self.typed(key, "true or false", |v| if let Value::Bool(b) = v { Some(*b) } else { None })
    }

    /// A string, if the key is there.
    pub fn opt_str(&self, key: &str) -> Result<Option<&str>, Error> {
        self.typed(key, "a string", |v| if let Value::String(s) = v { Some(s.as_str()) } else { None })
    }

    /// A list of any type, if the key is there.
    pub fn opt_array(&self, key: &str) -> Result<Option<&Array>, Error> {
        self.typed(key, "a list", |v| if let Value::Array(a) = v { Some(a) } else { None })
    }

    /// A list of strings, if the key is there.
    pub fn opt_strings(&self, key: &str) -> Result<Option<&[String]>, Error> {
        self.typed(key, "a list of strings", |v| match v {
            Value::Array(Array::String(s)) => Some(s.as_slice()),
            _ => None,
        })
    }

    /// A list of numbers (f32, or f64 rounded to it), if the key is there.
    pub fn opt_f32s(&self, key: &str) -> Result<Option<Vec<f32>>, Error> {
        self.typed(key, "a list of numbers", |v| match v {
            Value::Array(Array::F32(x)) => Some(x.clone()),
            Value::Array(Array::F64(x)) => Some(x.iter().map(|&x| x as f32).collect()),
            _ => None,
        })
    }

    /// A list of whole numbers of any integer type, if the key is there.
    pub fn opt_integers(&self, key: &str) -> Result<Option<Vec<i64>>, Error> {
        self.typed(key, "a list of whole numbers", |v| match v {
            Value::Array(a) => a.integers(),
            _ => None,
        })
    }

    required! {
        /// A whole number from 0 to 2^32 - 1.
        u32, opt_u32 -> u32;
        /// A whole number from 0.
        usize, opt_usize -> usize;
        /// A number (f32, or f64 rounded to it).
        f32, opt_f32 -> f32;
        /// Yes or no.
        bool, opt_bool -> bool;
        /// A string.
        str, opt_str -> &str;
        /// A list of any type.
        array, opt_array -> &Array;
        /// A list of strings.
        strings, opt_strings -> &[String];
        /// A list of numbers (f32, or f64 rounded to it).
        f32s, opt_f32s -> Vec<f32>;
        /// A list of whole numbers of any integer type.
        integers, opt_integers -> Vec<i64>;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn getters_convert_what_fits_and_refuse_the_rest() {
        let mut m = Metadata::new(Path::new("x.gguf"));
        m.insert("a", Value::I64(7));
        m.insert("b", Value::I8(-1));
        m.insert("c", Value::U64(u64::MAX));
        m.insert("d", Value::F64(0.1));
        m.insert("e", Value::Array(Array::I16(vec![-1, 2])));
        m.insert("f", Value::Array(Array::U64(vec![u64::MAX])));
        assert_eq!(m.u32("a").unwrap(), 7);
        assert_eq!(m.f32("d").unwrap(), 0.1);
        assert_eq!(m.integers("e").unwrap(), [-1, 2]);
        for (key, said) in [
            ("b", "x.gguf: key b is i8 -1, where a whole number below 2^32 is expected"),
            ("c", "is u64 18446744073709551615, where"),
            ("d", "is f64 0.1, where"),
            ("e", "is 2 i16 [-1, 2], where"),
            ("g", "key g is missing; the file is incomplete"),
        ] {
            let got = m.u32(key).unwrap_err().to_string();
            assert!(got.contains(said), "{got:?} lacks {said:?}");
        }
        assert!(m.integers("f").is_err());
        assert!(m.opt_bool("a").is_err());
        assert!(m.opt_bool("g").unwrap().is_none());
    }

    #[test]
    fn order_survives_replacing_and_removing() {
        let mut m = Metadata::default();
        for (i, k) in ["a", "b", "c", "d"].into_iter().enumerate() {
            assert_eq!(m.insert(k, Value::U32(i as u32)), None);
        }
        assert_eq!(m.insert("b", Value::Bool(true)), Some(Value::U32(1)));
        assert_eq!(m.remove("a"), Some(Value::U32(0)));
        assert_eq!(m.remove("a"), None);
        assert_eq!(m.iter().map(|(k, _)| k).collect::<Vec<_>>(), ["b", "c", "d"]);
        assert_eq!(m.get("d"), Some(&Value::U32(3)));
    }

    #[test]
    fn long_arrays_are_shown_by_their_beginning() {
        let v = Value::Array(Array::String((0..9).map(|i| i.to_string()).collect()));
        assert_eq!(v.to_string(), r#"9 string ["0", "1", "2", "3", "4", "5", ..]"#);
    }
}
