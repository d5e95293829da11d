//! What a written file says of itself: what it was made from and how, and how good it was found to be by which protocol.
//!
//! It travels in the file, as JSON under [`KEY`] in GGUF metadata or as `meta` of `quantize_config.json`, so that numbers
//! are never without the text and the windows that they were measured with.

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// The key in GGUF metadata.
pub const KEY: &str = "sparsam.passport";

/// Where a file comes from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Passport {
    /// Of this program.
    pub version: String,
    /// The command that made it.
    pub command: String,
    /// The file that it was made from.
    pub parent: String,
    /// SHA-256 of that file; of a folder, of its weights' files one after the other.
    pub parent_sha256: String,
    /// What was asked for: a type, a size, bits a weight, a divergence.
    pub goal: String,
    /// How codes were chosen, with all settings.
    pub method: String,
    /// The calibration text and how much of it; `None` if none was used.
    pub calibration: Option<String>,
    /// A 64-bit hash (FNV-1a) of its tokens.
    pub calibration_hash: Option<String>,
    /// How good it is, if it was measured.
    pub score: Option<Score>,
}

/// Which tokens of what text were scored, and with what before them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// The text's name.
    pub text: String,
    /// Its SHA-256.
    pub text_sha256: String,
    /// Tokens of a window.
    pub context: usize,
    /// Tokens from one window's begin to the next one's.
    pub stride: usize,
    /// Windows side by side, the second half of each scored (llama.cpp); otherwise what the one before did not reach
    /// (Hugging Face).
    pub second_half: bool,
    /// Windows scored.
    pub chunks: usize,
    /// Whether each window begins with the token that begins a text.
    pub bos: bool,
    /// Tokens scored.
    pub tokens_scored: usize,
    /// f32 activations, not 8-bit ones.
    pub exact: bool,
}

/// Both models on the same tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Score {
    /// What was measured.
    pub protocol: Measured,
    /// Of the parent.
    pub perplexity_before: f64,
    /// Of the result.
    pub perplexity: f64,
    /// One standard error of it, as if tokens were independent.
    pub standard_error: f64,
    /// Mean divergence from the parent's predictions, in nats a token.
    pub divergence: f64,
    /// Its 99th percentile.
    pub divergence_p99: f64,
    /// Share of tokens for which both hold the same token most likely.
    pub top1_agreement: f64,
}

impl std::fmt::Display for Measured {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (c, s, n) = (self.context, self.stride, self.chunks);
        match self.second_half {
            true => write!(f, "{}: {n} windows of {c} side by side, second half scored", self.text)?,
            false => write!(f, "{}: {n} windows of {c} every {s} tokens, new tokens scored", self.text)?,
        }
        let (bos, exact) =
            (if self.bos { "with BOS" } else { "no BOS" }, if self.exact { "f32" } else { "8-bit" });
        write!(f, ", {bos}, {exact} activations, {} tokens scored", self.tokens_scored)
    }
}

impl Measured {
    /// What differs from another protocol; numbers can be compared only if nothing does.
    pub fn differences(&self, other: &Measured) -> Vec<String> {
        let mut all = Vec::new();
        let mut check = |what: &str, a: String, b: String| {
            if a != b {
                all.push(format!("{what}: {a} and {b}"));
            }
        };
        let text = |m: &Measured| format!("{} ({:.12})", m.text, m.text_sha256);
        if self.text_sha256 != other.text_sha256 {
            check("text", text(self), text(other));
        }
        check("context", self.context.to_string(), other.context.to_string());
        check("stride", self.stride.to_string(), other.stride.to_string());
        check("second half only", self.second_half.to_string(), other.second_half.to_string());
        check("windows", self.chunks.to_string(), other.chunks.to_string());
        check("BOS", self.bos.to_string(), other.bos.to_string());
        check("tokens scored", self.tokens_scored.to_string(), other.tokens_scored.to_string());
        check("f32 activations", self.exact.to_string(), other.exact.to_string());
        all
    }
}

impl Passport {
    /// As the file holds it.
    pub fn to_json(&self) -> Value {
        serde_json::to_value(self).expect("plain data")
    }

    /// From what a file holds; `None` if that is no passport.
    pub fn from_json(value: &Value) -> Option<Passport> {
        serde_json::from_value(value.clone()).ok()
    }

    /// Names and values, for people.
    pub fn lines(&self) -> Vec<(&'static str, String)> {
        let mut lines = vec![
            ("made from", format!("{} ({:.16}..)", self.parent, self.parent_sha256)),
            ("goal", self.goal.clone()),
            ("method", self.method.clone()),
            ("calibration", self.calibration.clone().unwrap_or_else(|| "none".into())),
            ("made by", format!("{} (sparsam {})", self.command, self.version)),
        ];
        if let Some(s) = &self.score {
            let interval = format!("{:.4} ± {:.4}", s.perplexity, 1.96 * s.standard_error);
            lines.push(("perplexity", format!("{interval} (95%), parent {:.4}", s.perplexity_before)));
            lines.push((
                "divergence",
                format!(
                    "{:.5} nats a token, 99% of tokens below {:.3}; same top token {:.2}%",
                    s.divergence,
                    s.divergence_p99,
                    100.0 * s.top1_agreement
                ),
            ));
            lines.push(("measured on", s.protocol.to_string()));
        }
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured() -> Measured {
        Measured {
            text: "valid.txt".into(),
            text_sha256: "ab".repeat(32),
            context: 512,
            stride: 512,
            second_half: true,
            chunks: 16,
            bos: false,
            tokens_scored: 4080,
            exact: true,
        }
    }

    #[test]
    fn unlike_protocols_say_what_differs() {
        let a = measured();
        assert!(a.differences(&a).is_empty());
        let b = Measured { context: 256, bos: true, ..measured() };
        assert_eq!(a.differences(&b), ["context: 512 and 256", "BOS: false and true"]);
        let renamed = Measured { text: "v.txt".into(), ..measured() };
        assert!(a.differences(&renamed).is_empty(), "the same text under another name");
        let other = Measured { text_sha256: "cd".repeat(32), ..measured() };
        assert!(a.differences(&other)[0].starts_with("text: valid.txt (abababababab)"));
    }

    #[test]
    fn passports_come_back_from_json() {
        let p = Passport {
            version: "0.1".into(),
            command: "sparsam quantize".into(),
            parent: "m.gguf".into(),
            parent_sha256: "00".into(),
            goal: "Q4_0".into(),
            method: "GPTQ".into(),
            calibration: None,
            calibration_hash: None,
            score: Some(Score {
                protocol: measured(),
                perplexity_before: 15.4,
                perplexity: 16.0,
                standard_error: 0.7,
                divergence: 0.05,
                divergence_p99: 0.4,
                top1_agreement: 0.9,
            }),
        };
        assert_eq!(Passport::from_json(&p.to_json()), Some(p.clone()));
        assert_eq!(Passport::from_json(&serde_json::json!({"version": 3})), None);
        let lines = p.lines();
        assert!(
            lines.iter().any(|(k, v)| *k == "perplexity" && v.starts_with("16.0000 ± 1.3720")),
            "{lines:?}"
        );
    }
}
