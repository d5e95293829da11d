//! Plots as data: series over two axes, drawn as SVG ([`Plot::to_svg`]) or in a terminal ([`Plot::to_text`]).
//!
//! Small on purpose: lines, points, bands and marks, each axis linear or logarithmic. Reports of other crates use it
//! too. Points that cannot be drawn (not finite, or not positive on a logarithmic axis) are left out.

use crate::units;

/// How numbers on an axis read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// As they are, three digits.
    Plain,
    /// `7B`.
    Count,
    /// `3e23`.
    Flop,
    /// `$4.6M`.
    Usd,
    /// `80 GB`.
    Bytes,
    /// `2 h`.
    Seconds,
}

impl Unit {
    /// `x` in this unit, short.
    pub fn show(self, x: f64) -> String {
        match self {
            Unit::Plain => units::three(x),
            Unit::Count => units::show_count(x),
            Unit::Flop => {
                let text = format!("{x:.1e}");
                text.replace(".0e", "e")
            }
            Unit::Usd => units::show_usd(x),
            Unit::Bytes => units::show_bytes(x),
            Unit::Seconds => units::show_seconds(x),
        }
    }
}

/// An axis.
#[derive(Clone, Debug, PartialEq)]
pub struct Axis {
    /// What it shows.
    pub label: String,
    /// How its numbers read.
    pub unit: Unit,
    /// Logarithmic?
    pub log: bool,
}

impl Axis {
    /// A linear axis of plain numbers.
    pub fn linear(label: &str) -> Axis {
        Axis { label: label.into(), unit: Unit::Plain, log: false }
    }

    /// A logarithmic axis.
    pub fn log(label: &str, unit: Unit) -> Axis {
        Axis { label: label.into(), unit, log: true }
    }
}

/// How a series is drawn.
#[derive(Clone, Debug, PartialEq)]
pub enum Form {
    /// Joined points.
    Line(Vec<(f64, f64)>),
    /// Dots.
    Points(Vec<(f64, f64)>),
    /// An area between a low and a high value: (x, low, high).
    Band(Vec<(f64, f64, f64)>),
}

/// Data with a name; `colour` picks one of the palette, so that a band and its line may share theirs.
#[derive(Clone, Debug, PartialEq)]
pub struct Series {
    /// In the legend; empty for none.
    pub name: String,
    /// Which colour, from 0.
    pub colour: usize,
    /// The data.
    pub form: Form,
}

/// A point with a label.
#[derive(Clone, Debug, PartialEq)]
pub struct Mark {
    /// Where.
    pub x: f64,
    /// Where.
    pub y: f64,
    /// What it says.
    pub label: String,
}

/// A plot.
#[derive(Clone, Debug, PartialEq)]
pub struct Plot {
    /// Above it.
    pub title: String,
    /// Horizontal.
    pub x: Axis,
    /// Vertical.
    pub y: Axis,
    /// In drawing order.
    pub series: Vec<Series>,
    /// On top.
    pub marks: Vec<Mark>,
}

/// A scale from data to the interval 0 to 1.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scale {
    low: f64,
    high: f64,
    log: bool,
}

impl Scale {
    fn over(values: impl Iterator<Item = f64>, log: bool, margin: f64) -> Scale {
        let warp = |x: f64| if log { x.log10() } else { x };
        let (mut low, mut high) = (f64::INFINITY, f64::NEG_INFINITY);
        for x in values.map(warp).filter(|x| x.is_finite()) {
            low = low.min(x);
            high = high.max(x);
        }
        if low > high {
            (low, high) = (0.0, 1.0);
        }
        // A single value still gets room on both sides.
        let span = if high > low { high - low } else { (high.abs() * 0.1).max(0.5) };
        let pad = if high > low { margin * span } else { span };
        Scale { low: low - pad, high: high + pad, log }
    }

    /// Where `x` lies, 0 to 1 within the axis; `None` if it cannot be drawn.
    pub(crate) fn place(&self, x: f64) -> Option<f64> {
        let x = if self.log { x.log10() } else { x };
        let t = (x - self.low) / (self.high - self.low);
        (t.is_finite() && (-1e-9..=1.0 + 1e-9).contains(&t)).then_some(t)
    }

    /// Round values within the axis, about `wanted` of them.
    pub(crate) fn ticks(&self, wanted: usize) -> Vec<f64> {
        let span = self.high - self.low;
        if self.log && span >= 1.0 {
            // Whole decades, or every second or third; with 2 and 5 between where they are few.
            let every = (span / wanted as f64).ceil().max(1.0) as i32;
            let steps: &[f64] = if span < 2.5 { &[1.0, 2.0, 5.0] } else { &[1.0] };
            let mut out = Vec::new();
            for decade in self.low.floor() as i32..=self.high.ceil() as i32 {
                for step in steps {
                    let x = f64::from(decade) + step.log10();
                    if decade % every == 0 && x >= self.low && x <= self.high {
                        out.push(10f64.powf(x));
                    }
                }
            }
            return out;
        }
        let (low, high) =
            if self.log { (10f64.powf(self.low), 10f64.powf(self.high)) } else { (self.low, self.high) };
        let rough = (high - low) / wanted as f64;
        let power = 10f64.powf(rough.log10().floor());
        let step =
            [1.0, 2.0, 5.0, 10.0].map(|s| s * power).into_iter().find(|s| *s >= rough).unwrap_or(rough);
        let first = (low / step).ceil() as i64;
        (first..first + 3 * wanted as i64)
            .map(|i| i as f64 * step)
            .take_while(|x| *x <= high + 1e-9 * step)
            .collect()
    }
}

impl Plot {
    /// The scales that hold all series and marks.
    pub(crate) fn scales(&self) -> (Scale, Scale) {
        let mut xs = Vec::new();
        let mut ys = Vec::new();
        for series in &self.series {
            match &series.form {
                Form::Line(points) | Form::Points(points) => {
                    for (x, y) in points {
                        xs.push(*x);
                        ys.push(*y);
                    }
                }
                Form::Band(points) => {
                    for (x, low, high) in points {
                        xs.push(*x);
                        ys.extend([*low, *high]);
                    }
                }
            }
        }
        for mark in &self.marks {
            xs.push(mark.x);
            ys.push(mark.y);
        }
        (Scale::over(xs.into_iter(), self.x.log, 0.0), Scale::over(ys.into_iter(), self.y.log, 0.05))
    }

    /// The plot in characters, `width` columns wide: braille dots for lines (2 by 4 to a character), `o` for points,
    /// `X` for marks. Bands are left out.
    pub fn to_text(&self, width: usize, height: usize) -> String {
        let (sx, sy) = self.scales();
        let y_ticks = sy.ticks(height / 3);
        let y_labels: Vec<String> = y_ticks.iter().map(|y| self.y.unit.show(*y)).collect();
        let margin = y_labels.iter().map(|l| l.chars().count()).max().unwrap_or(0) + 2;
        let columns = width.saturating_sub(margin).max(10);
        let mut canvas = Canvas::new(columns, height);
        for series in &self.series {
            if let Form::Line(points) = &series.form {
                let placed: Vec<(f64, f64)> =
                    points.iter().filter_map(|(x, y)| Some((sx.place(*x)?, sy.place(*y)?))).collect();
                for pair in placed.windows(2) {
                    canvas.line(pair[0], pair[1]);
                }
            }
        }
        for series in &self.series {
            if let Form::Points(points) = &series.form {
                for at in points.iter().filter_map(|(x, y)| Some((sx.place(*x)?, sy.place(*y)?))) {
                    canvas.put(at, 'o');
                }
            }
        }
        for at in self.marks.iter().filter_map(|m| Some((sx.place(m.x)?, sy.place(m.y)?))) {
            canvas.put(at, 'X');
        }
        let mut out = format!("{}\n", self.title);
        let label_rows: Vec<(usize, &String)> = y_ticks
            .iter()
            .zip(&y_labels)
            .filter_map(|(y, label)| {
                Some((((1.0 - sy.place(*y)?) * (height - 1) as f64).round() as usize, label))
            })
            .collect();
        for (i, row) in canvas.rows().enumerate() {
            let label = label_rows.iter().find(|(at, _)| *at == i).map_or("", |(_, l)| l.as_str());
            let tick = if label.is_empty() { '│' } else { '┤' };
            let pad = margin - 2;
            out += &format!("{label:>pad$} {tick}{}\n", row.trim_end());
        }
        out += &format!("{}└{}\n", " ".repeat(margin - 1), "─".repeat(columns));
        let mut labels = vec![' '; width];
        for x in sx.ticks((columns / 12).max(2)) {
            let Some(t) = sx.place(x) else { continue };
            let text = self.x.unit.show(x);
            let middle = margin + (t * (columns - 1) as f64).round() as usize;
            let start = middle.saturating_sub(text.len() / 2).min(width.saturating_sub(text.len()));
            // A label that would touch its neighbour is left out.
            let clear = start.saturating_sub(1)..(start + text.len() + 1).min(width);
            if labels[clear].iter().all(|c| *c == ' ') {
                labels.splice(start..start + text.chars().count(), text.chars());
            }
        }
        let labels: String = labels.into_iter().collect();
        out += &format!("{}\n", labels.trim_end());
        let indent = " ".repeat(margin);
        out += &format!("{indent}{}  (up: {})\n", self.x.label, self.y.label);
        for mark in &self.marks {
            out += &format!("{indent}X {}\n", mark.label);
        }
        out
    }
}

/// Characters with braille dots and glyphs over them.
struct Canvas {
    columns: usize,
    rows: usize,
    dots: Vec<u8>,
    glyphs: Vec<Option<char>>,
}

impl Canvas {
    fn new(columns: usize, rows: usize) -> Canvas {
        Canvas { columns, rows, dots: vec![0; columns * rows], glyphs: vec![None; columns * rows] }
    }

    fn dot(&mut self, x: usize, y: usize) {
        // Braille's bits for (column, row) of a cell: Unicode 15, block 2800.
        const BITS: [[u8; 4]; 2] = [[0x01, 0x02, 0x04, 0x40], [0x08, 0x10, 0x20, 0x80]];
        if x < self.columns * 2 && y < self.rows * 4 {
            self.dots[y / 4 * self.columns + x / 2] |= BITS[x % 2][y % 4];
        }
    }

    fn line(&mut self, from: (f64, f64), to: (f64, f64)) {
        let place =
            |(x, y): (f64, f64)| (x * (self.columns * 2 - 1) as f64, (1.0 - y) * (self.rows * 4 - 1) as f64);
        let (from, to) = (place(from), place(to));
        let steps = (to.0 - from.0).abs().max((to.1 - from.1).abs()).ceil().max(1.0) as usize;
        for i in 0..=steps {
            let t = i as f64 / steps as f64;
            let (x, y) = (from.0 + t * (to.0 - from.0), from.1 + t * (to.1 - from.1));
            self.dot(x.round().max(0.0) as usize, y.round().max(0.0) as usize);
        }
    }

    fn put(&mut self, (x, y): (f64, f64), glyph: char) {
        let column = (x * (self.columns - 1) as f64).round() as usize;
        let row = ((1.0 - y) * (self.rows - 1) as f64).round() as usize;
        if let Some(cell) = self.glyphs.get_mut(row * self.columns + column) {
            *cell = Some(glyph);
        }
    }

    fn rows(&self) -> impl Iterator<Item = String> {
        (0..self.rows).map(|row| {
            (0..self.columns)
                .map(|column| {
                    let at = row * self.columns + column;
                    let dots = self.dots[at];
                    let braille = char::from_u32(0x2800 + u32::from(dots)).filter(|_| dots != 0);
                    self.glyphs[at].or(braille).unwrap_or(' ')
                })
                .collect()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plot() -> Plot {
        Plot {
            title: "loss".into(),
            x: Axis::log("parameters", Unit::Count),
            y: Axis::linear("nats"),
            series: vec![
                Series {
                    name: "band".into(),
                    colour: 0,
                    form: Form::Band(vec![(1e6, 2.0, 3.0), (1e9, 1.5, 2.5)]),
                },
                Series { name: "law <1>".into(), colour: 0, form: Form::Line(vec![(1e6, 2.5), (1e9, 2.0)]) },
                Series {
                    name: String::new(),
                    colour: 1,
                    form: Form::Points(vec![(1e7, 2.4), (-1.0, 2.0), (1e8, f64::NAN)]),
                },
            ],
            marks: vec![Mark { x: 1e8, y: 2.2, label: "here".into() }],
        }
    }

    #[test]
    fn ticks_are_round_and_inside() {
        let scale = |low, high, log| Scale::over([low, high].into_iter(), log, 0.0);
        assert_eq!(scale(0.0, 1.0, false).ticks(5), [0.0, 0.2, 0.4, 0.6000000000000001, 0.8, 1.0]);
        assert_eq!(scale(1e6, 1e9, true).ticks(5).len(), 4);
        assert_eq!(
            scale(3e6, 7e7, true).ticks(5).iter().map(|x| Unit::Count.show(*x)).collect::<Vec<_>>(),
            ["5M", "10M", "20M", "50M"]
        );
        assert_eq!(scale(2.0, 3.0, true).ticks(4), [2.0, 2.5, 3.0]);
        assert!(scale(5.0, 5.0, false).ticks(4).contains(&5.0));
    }

    #[test]
    fn text_fits_its_width_and_shows_everything() {
        let text = plot().to_text(60, 12);
        assert!(text.lines().all(|l| l.chars().count() <= 60), "{text}");
        for part in ["loss", "parameters", "nats", "here", "X", "o", "1M", "1B", "2.5"] {
            assert!(text.contains(part), "no {part} in\n{text}");
        }
    }

    #[test]
    fn nothing_to_draw_is_no_panic() {
        let empty = Plot { series: vec![], marks: vec![], ..plot() };
        assert!(empty.to_text(40, 8).contains("loss"));
        assert!(empty.to_svg().contains("</svg>"));
    }

    #[test]
    fn svg_is_balanced_escaped_and_without_strays() {
        let svg = plot().to_svg();
        assert!(svg.contains("law &lt;1&gt;") && !svg.contains("NaN") && !svg.contains("inf"));
        assert_eq!(svg.matches("<circle").count(), 2, "one point can be drawn, and the mark:\n{svg}");
        assert_eq!(svg.matches("<g").count(), svg.matches("</g>").count());
        assert_eq!(svg.matches("<text").count(), svg.matches("</text>").count());
    }
}
