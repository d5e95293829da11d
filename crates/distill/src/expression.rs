//! Arithmetic as people write it in answers: `(84 / 2)`, `$1,200.50`, `3 x 4 - 1`.
//!
//! Nothing is executed: a recursive-descent parser over `+ - * /`, parentheses, signs, `%` and decimal numbers, with
//! limits on length and depth.
//!
//! ```text
//! sum     = product (("+" | "-") product)*
//! product = signed (("*" | "x" | "×" | "·" | "/" | "÷") signed)*
//! signed  = ("-" | "+")* operand "%"?
//! operand = number | "(" sum ")"
//! ```

/// Characters that are looked at, at most.
const MAX_LENGTH: usize = 1000;
/// Parentheses inside one another, at most.
const MAX_DEPTH: usize = 50;

/// The value of `text`, all of which must be one expression. `None` if it is not, or has no finite value.
///
/// ```
/// use sparsam_distill::expression::evaluate;
/// assert_eq!(evaluate("(7 * 36) - 2"), Some(250.0));
/// assert_eq!(evaluate("1 / 0"), None);
/// assert_eq!(evaluate("7 apples"), None);
/// ```
pub fn evaluate(text: &str) -> Option<f64> {
    let mut p = Parser::new(text).filter(|p| p.text.len() == text.len())?;
    let value = p.sum(0)?;
    p.skip_space();
    (p.at == p.text.len() && value.is_finite()).then_some(value)
}

/// The first expression in `text` and its value; where an equation stands, what is behind its last `=`.
///
/// ```
/// use sparsam_distill::expression::first;
/// assert_eq!(first("(84 / 2)."), Some(("(84 / 2)", 42.0)));
/// assert_eq!(first("$1,200 a month"), Some(("$1,200", 1200.0)));
/// assert_eq!(first("7 * 6 = 42 apples"), Some(("42", 42.0)));
/// assert_eq!(first("none"), None);
/// ```
pub fn first(text: &str) -> Option<(&str, f64)> {
    if let Some((_, right)) = text.rsplit_once('=')
        && let Some(found) = first_of(right)
    {
        return Some(found);
    }
    first_of(text)
}

fn first_of(text: &str) -> Option<(&str, f64)> {
    let mut before = ' ';
    for (at, c) in text.char_indices().take(MAX_LENGTH) {
        // `R2` and `x-3` name things; a number begins where no word goes on.
        let begins = c.is_ascii_digit() && !before.is_alphanumeric() && before != '.'
            || matches!(c, '(' | '$' | '€' | '£')
            || matches!(c, '-' | '.') && !before.is_alphanumeric();
        before = c;
        if !begins {
            continue;
        }
        let rest = &text[at..];
        let Some(mut p) = Parser::new(rest) else { continue };
        if let Some(value) = p.sum(0).filter(|v| v.is_finite()) {
            return Some((&rest[..p.at], value));
        }
    }
    None
}

/// Whether two values are the same answer: to four digits behind the point, or relative to the larger.
pub fn same(a: f64, b: f64) -> bool {
    (a - b).abs() <= 1e-4 * a.abs().max(b.abs()).max(1.0)
}

struct Parser<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Parser<'a> {
    fn new(text: &'a str) -> Option<Parser<'a>> {
        // The head of a longer text is enough: an answer stands there.
        let end = text.char_indices().nth(MAX_LENGTH).map_or(text.len(), |(i, _)| i);
        Some(Parser { text: &text[..end], at: 0 }).filter(|p| !p.text.is_empty())
    }

    fn peek(&self) -> Option<char> {
        self.text[self.at..].chars().next()
    }

    fn skip_space(&mut self) {
        while let Some(c) = self.peek().filter(|c| c.is_whitespace()) {
            self.at += c.len_utf8();
        }
    }

    /// The operator that comes next, if it is one of `wanted`.
    fn operator(&mut self, wanted: &[char]) -> Option<char> {
        self.skip_space();
        let c = self.peek().filter(|c| wanted.contains(c))?;
        self.at += c.len_utf8();
        Some(c)
    }

    fn sum(&mut self, depth: usize) -> Option<f64> {
        let mut value = self.product(depth)?;
        loop {
            let before = self.at;
            let next = self.operator(&['+', '-', '−']).and_then(|o| Some((o, self.product(depth)?)));
            match next {
                Some(('+', x)) => value += x,
                Some((_, x)) => value -= x,
                None => {
                    self.at = before;
                    return Some(value);
                }
            }
        }
    }

    fn product(&mut self, depth: usize) -> Option<f64> {
        let mut value = self.signed(depth)?;
        loop {
            let before = self.at;
            let wanted = ['*', 'x', '×', '·', '/', '÷'];
            match self.operator(&wanted).and_then(|o| Some((o, self.signed(depth)?))) {
                Some(('/' | '÷', x)) => value /= x,
                Some((_, x)) => value *= x,
                None => {
                    self.at = before;
                    return Some(value);
                }
            }
        }
    }

    fn signed(&mut self, depth: usize) -> Option<f64> {
        let mut sign = 1.0;
        while let Some(c) = self.operator(&['-', '+', '−']) {
            sign *= if c == '+' { 1.0 } else { -1.0 };
        }
        let value = sign * self.operand(depth)?;
        if self.peek() == Some('%') {
            self.at += 1;
            return Some(value / 100.0);
        }
        Some(value)
    }

    fn operand(&mut self, depth: usize) -> Option<f64> {
        if self.operator(&['(']).is_some() {
            if depth == MAX_DEPTH {
                return None;
            }
            let value = self.sum(depth + 1)?;
            self.operator(&[')'])?;
            return Some(value);
        }
        self.operator(&['$', '€', '£']);
        self.number()
    }

    /// Digits, in groups of three behind commas or not, and a part behind the point.
    fn number(&mut self) -> Option<f64> {
        let bytes = self.text.as_bytes();
        let digit = |i: usize| bytes.get(i).is_some_and(u8::is_ascii_digit);
        let mut end = self.at;
        let mut plain = String::new();
        let mut grouped = false;
        while digit(end) {
            plain.push(bytes[end] as char);
            end += 1;
            let group = bytes.get(end) == Some(&b',')
                && (1..=3).all(|i| digit(end + i))
                && !digit(end + 4)
                && (grouped || plain.len() <= 3);
            if group {
                grouped = true;
                end += 1;
            }
        }
        if bytes.get(end) == Some(&b'.') && digit(end + 1) {
            plain.push('.');
            end += 1;
            while digit(end) {
                plain.push(bytes[end] as char);
                end += 1;
            }
        }
        let value = plain.parse().ok()?;
        self.at = end;
        Some(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[track_caller]
    fn check(text: &str, want: Option<f64>) {
        assert_eq!(evaluate(text), want, "{text}");
    }

    #[test]
    fn what_answers_look_like() {
        check("( ( 17.0 + 15.0 ) + 2.0 )", Some(34.0));
        check("8 - 3 - 2", Some(3.0));
        check("2 + 3 * 4", Some(14.0));
        check("24 / 4 / 2", Some(3.0));
        check("-(2 - 5)", Some(3.0));
        check("3 x 4", Some(12.0));
        check("6 ÷ 4", Some(1.5));
        check("$1,234,567.25", Some(1_234_567.25));
        check("20% * 50", Some(10.0));
        check(".5", Some(0.5));
        check("0.5", Some(0.5));
        check("1,2", None);
        check("1234,567", None);
        check("(1", None);
        check("1)", None);
        check("", None);
        check("0/0", None);
        check("1e5", None);
    }

    #[test]
    fn an_answer_is_found_in_its_sentence() {
        let value = |text: &str| first(text).map(|f| f.1);
        assert_eq!(value(" (7 * 36)."), Some(252.0));
        assert_eq!(value(" 5 - apples"), Some(5.0));
        assert_eq!(value("about 42."), Some(42.0));
        assert_eq!(value("(b) 9"), Some(9.0));
        assert_eq!(value("route R2 takes 3 hours"), Some(3.0));
        assert_eq!(value("x = y"), None);
        assert_eq!(value("-3 degrees"), Some(-3.0));
    }

    #[test]
    fn hostile_text_is_refused_quickly() {
        check(&"(".repeat(100_000), None);
        check(&"-".repeat(100_000), None);
        let deep = |n: usize| "(".repeat(n) + "1" + &")".repeat(n);
        check(&deep(MAX_DEPTH), Some(1.0));
        check(&deep(MAX_DEPTH + 1), None);
        assert_eq!(first(&"(".repeat(5_000)), None);
        check(&"+1".repeat(600), None);
    }

    /// An expression's text, fully parenthesised or not, with its value by Rust's own arithmetic.
    fn any_expression() -> impl Strategy<Value = (String, f64)> {
        let leaf = (0u32..1000).prop_map(|n| (n.to_string(), f64::from(n)));
        leaf.prop_recursive(5, 40, 2, |inner| {
            (inner.clone(), inner, 0usize..4).prop_map(|((a, x), (b, y), op)| {
                let value = [x + y, x - y, x * y, x / y][op];
                (format!("({a} {} {b})", ["+", "-", "*", "/"][op]), value)
            })
        })
    }

    proptest! {
        #[test]
        fn values_are_those_of_the_tree((text, value) in any_expression()) {
            prop_assert_eq!(evaluate(&text), Some(value).filter(|v| v.is_finite()));
            if value.is_finite() {
                let sentence = format!("{text} apples.");
                prop_assert_eq!(first(&sentence), Some((text.as_str(), value)));
            }
        }

        #[test]
        fn precedence_is_the_usual(a in 1i32..100, b in 1i32..100, c in 1i32..100, d in 1i32..100) {
            let [x, y, z, w] = [a, b, c, d].map(f64::from);
            prop_assert_eq!(evaluate(&format!("{a} - {b} * {c} + {d}")), Some(x - y * z + w));
            prop_assert_eq!(evaluate(&format!("{a}/{b}-{c}-{d}")), Some(x / y - z - w));
        }

        #[test]
        fn any_text_is_answered_without_a_panic(text in "\\PC*") {
            let _ = (evaluate(&text), first(&text));
        }

        #[test]
        fn numbers_with_groups_are_numbers(n in 0u64..10_000_000_000) {
            let plain = n.to_string();
            let mut grouped = String::new();
            for (i, c) in plain.chars().enumerate() {
                if i > 0 && (plain.len() - i) % 3 == 0 {
                    grouped.push(',');
                }
                grouped.push(c);
            }
            prop_assert_eq!(evaluate(&grouped), Some(n as f64));
        }
    }
}
