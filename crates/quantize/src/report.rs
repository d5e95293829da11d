//! What a run did, as JSON and as a page that needs nothing else.

use crate::heal::Healed;
use crate::passport::Passport;
use crate::stream::Layer;
use serde::{Deserialize, Serialize};

/// What one run did and what it cost.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The file that was written.
    pub output: String,
    /// Size of the file.
    pub bytes: usize,
    /// Size of the parent.
    pub parent_bytes: usize,
    /// Of the tensors.
    pub bits_per_weight: f64,
    /// What the file says of itself.
    pub passport: Passport,
    /// Time of the run, without the scoring.
    pub seconds: f64,
    /// Tokens that the result was expected to write in a second, if its types were chosen by a goal.
    #[serde(default)]
    pub expected_tokens_per_second: Option<f64>,
    /// Speed and memory of the parent and of the result, if they were measured.
    pub runs: Option<[Runs; 2]>,
    /// What healing did to each block.
    pub healing: Vec<Healed>,
    /// Each tensor.
    pub layers: Vec<Layer>,
}

/// What a model takes to run.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Runs {
    /// Tokens written in a second, one text.
    pub tokens_per_second: f64,
    /// Bytes of weights in memory.
    pub weight_bytes: usize,
}

impl Report {
    /// Mean over calibrated layers of the output's error over its size: of the result, and of nearest rounding on the same
    /// scales. `None` if none was calibrated.
    pub fn mean_errors(&self) -> Option<(f64, f64)> {
        let errors: Vec<_> = self.layers.iter().filter_map(|l| l.error).collect();
        let n = errors.len() as f64;
        let share = |error: f64, output: f64| if output > 0.0 { error / output } else { 0.0 };
        let ours: f64 = errors.iter().map(|e| share(e.rounded, e.output)).sum();
        let nearest: f64 = errors.iter().map(|e| share(e.nearest, e.output)).sum();
        (!errors.is_empty()).then_some((ours / n, nearest / n))
    }

    /// Mean error of the healed blocks before and after, where what was found was not taken, twice the same; `None` if
    /// nothing was healed.
    pub fn mean_healing(&self) -> Option<(f64, f64)> {
        let n = self.healing.len() as f64;
        let before: f64 = self.healing.iter().map(|h| h.before).sum();
        let after: f64 = self.healing.iter().map(|h| if h.kept { h.after } else { h.before }).sum();
        (n > 0.0).then_some((before / n, after / n))
    }

    /// A page with tables and a plot of the error of each layer; it loads nothing.
    pub fn html(&self) -> String {
        let mb = |bytes: usize| format!("{:.1} MB", bytes as f64 / 1e6);
        let mut rows = vec![
            ("file", format!("{}, {}; parent {}", self.output, mb(self.bytes), mb(self.parent_bytes))),
            ("bits a weight", format!("{:.2}", self.bits_per_weight)),
        ];
        rows.extend(self.passport.lines());
        if let Some([before, after]) = &self.runs {
            let speed = (after.tokens_per_second, before.tokens_per_second);
            let expected = self.expected_tokens_per_second.map(|e| format!(" ({e:.0} expected)"));
            let expected = expected.unwrap_or_default();
            rows.push(("writes", format!("{:.0} tokens a second{expected}, parent {:.0}", speed.0, speed.1)));
            let memory = (mb(after.weight_bytes), mb(before.weight_bytes));
            rows.push(("weights in memory", format!("{}, parent {}", memory.0, memory.1)));
        }
        if let Some((before, after)) = self.mean_healing() {
            let line = format!("block error {:.3}% to {:.3}% on average", 100.0 * before, 100.0 * after);
            rows.push(("healing", line));
        }
        let few = self.layers.iter().filter(|l| l.fell_back()).count();
        if few > 0 {
            rows.push(("fell back", format!("{few} layers, marked below")));
        }
        rows.push(("time", format!("{:.0} s", self.seconds)));
        let facts: String =
            rows.iter().map(|(k, v)| format!("<tr><th>{}<td>{}", escape(k), escape(v))).collect();
        let layers: String = self.layers.iter().map(layer_row).collect();
        format!(
            "<!doctype html><meta charset=utf-8><title>{title}</title><style>\
             body{{font:15px system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em}}\
             table{{border-collapse:collapse}}th{{text-align:left;font-weight:600}}\
             td,th{{padding:2px 12px 2px 0}}td.n{{text-align:right;font-variant-numeric:tabular-nums}}\
             svg{{width:100%;height:auto}}</style>\n<h1>{title}</h1>\n<table>{facts}</table>\n\
             <h2>Error of each layer's output, share of its size</h2>\n{plot}\n\
             <h2>Tensors</h2>\n<table><tr><th>tensor<th>from<th>to<th>error<th>nearest<th>rank<th>condition<th>time{layers}</table>\n",
            title = escape(&format!("Rounding {}", self.output)),
            plot = self.plot(),
        )
    }

    /// Dots by layer on a logarithmic axis: filled for the result, hollow for nearest rounding.
    fn plot(&self) -> String {
        let errors: Vec<_> = self.layers.iter().filter_map(|l| Some((l, l.error?))).collect();
        let shares = errors.iter().flat_map(|(_, e)| [e.rounded / e.output, e.nearest / e.output]);
        let (lo, hi) = shares
            .filter(|v| v.is_finite() && *v > 0.0)
            .fold((f64::INFINITY, 0.0f64), |(lo, hi), v| (lo.min(v), hi.max(v)));
        if hi <= 0.0 {
            return "<p>No layer was calibrated.</p>".into();
        }
        let (lo, hi) = (lo.log10().floor(), hi.log10().ceil());
        let y = |v: f64| 300.0 - 280.0 * ((v.max(1e-30).log10() - lo) / (hi - lo).max(1.0)).clamp(0.0, 1.0);
        let x = |i: usize| 60.0 + 920.0 * (i as f64 + 0.5) / errors.len() as f64;
        let mut out = String::from("<svg viewBox='0 0 1000 320' role=img aria-label='error by layer'>");
        for power in lo as i32..=hi as i32 {
            let at = y(10f64.powi(power));
            out += &format!(
                "<path d='M60 {at:.1}H980' stroke='#ccc'/><text x=4 y={:.1} font-size=12>1e{power}</text>",
                at + 4.0
            );
        }
        for (i, (layer, e)) in errors.iter().enumerate() {
            let name = escape(&layer.name);
            out += &format!(
                "<circle cx={x:.1} cy={near:.1} r=3 fill=none stroke='#888'/>\
                 <circle cx={x:.1} cy={ours:.1} r=3 fill='#06c'><title>{name}</title></circle>",
                x = x(i),
                near = y(e.nearest / e.output),
                ours = y(e.rounded / e.output),
            );
        }
        out + "</svg><p>Filled: this file. Hollow: nearest rounding on the same scales.</p>"
    }
}

fn layer_row(l: &Layer) -> String {
    let [error, nearest] = match l.error {
        Some(e) => {
            [e.rounded, e.nearest].map(|v| format!("{:.4}%", 100.0 * v / e.output.max(f64::MIN_POSITIVE)))
        }
        None => ["".to_string(), "".to_string()],
    };
    let mut notes = String::new();
    if l.dead_inputs > 0 {
        notes += &format!(" ({} inputs never used)", l.dead_inputs);
    }
    if let Some(damping) = l.raised_damping {
        notes += &format!(" (damping raised to {damping})");
    }
    if l.fell_back() {
        notes += " *";
    }
    let (rank, condition) = match l.health {
        Some(h) => (
            format!("{:.0} of {}, {} tokens", h.rank, l.shape.last().unwrap_or(&0), h.tokens),
            format!("{:.1e}", h.condition),
        ),
        None => (String::new(), String::new()),
    };
    format!(
        "<tr><td>{}{notes}<td>{}<td>{}<td class=n>{error}<td class=n>{nearest}<td class=n>{rank}<td class=n>{condition}<td class=n>{:.1} s",
        escape(&l.name),
        escape(&l.from),
        escape(&l.to),
        l.seconds
    )
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('\'', "&#39;")
        .replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gptq::LayerError;

    fn report(name: &str) -> Report {
        let error = LayerError { nearest: 2.0, rounded: 1.0, output: 100.0, rows_nearest: 0 };
        let layer = |name: &str, error| Layer {
            name: name.into(),
            from: "F32".into(),
            to: "Q4_0".into(),
            shape: vec![2, 32],
            error,
            ..Layer::default()
        };
        let passport = Passport {
            version: "0".into(),
            command: "sparsam quantize".into(),
            parent: "m.gguf".into(),
            parent_sha256: "00".into(),
            goal: "Q4_0".into(),
            method: "gptq".into(),
            calibration: None,
            calibration_hash: None,
            score: None,
        };
        let healed = |before, after, kept| Healed { layer: 0, before, after, kept };
        Report {
            output: name.into(),
            bytes: 1_500_000,
            parent_bytes: 9_000_000,
            bits_per_weight: 4.5,
            passport,
            seconds: 3.0,
            expected_tokens_per_second: None,
            runs: None,
            healing: vec![healed(0.03, 0.01, true), healed(0.01, 0.5, false)],
            layers: vec![layer("a", Some(error)), layer("b", None)],
        }
    }

    #[test]
    fn the_page_shows_what_was_measured_and_lets_no_name_become_code() {
        let r = report("<script>x</script>.gguf");
        assert_eq!(r.mean_errors(), Some((0.01, 0.02)));
        let (before, after) = r.mean_healing().unwrap();
        assert!((before - 0.02).abs() < 1e-12 && (after - 0.01).abs() < 1e-12, "{before} {after}");
        let page = r.html();
        assert!(!page.contains("<script>") && page.contains("&lt;script&gt;"), "{page}");
        assert!(page.contains("1.0000%") && page.contains("2.0000%") && page.contains("1.5 MB"));
        assert_eq!(page.matches("<circle").count(), 2);
        assert!(!page.contains("http"), "the page loads nothing");
    }

    #[test]
    fn reports_come_back_from_json() {
        let r = report("x");
        let text = serde_json::to_string(&r).unwrap();
        assert_eq!(serde_json::from_str::<Report>(&text).unwrap(), r);
    }
}
