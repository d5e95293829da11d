//! Plots as SVG: self-contained, following the viewer's light or dark scheme.

use crate::plot::{Form, Plot, Scale};
use std::fmt::Write;

const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 420.0;
const LEFT: f64 = 76.0;
const RIGHT: f64 = 20.0;
const BOTTOM: f64 = 54.0;
/// Height of a line of the legend.
const LINE: f64 = 20.0;
/// Width of a letter of 13 pixels, for laying out the legend; a little generous.
const LETTER: f64 = 7.2;
/// Colours that those who see few colours can tell apart (Okabe and Ito 2008), and lighter ones for dark pages.
const LIGHT: [&str; 7] = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b07c00", "#56b4e9", "#666666"];
const DARK: [&str; 7] = ["#56b4e9", "#ff8a3d", "#2fd3a5", "#e6a1c8", "#f0c040", "#8fd0ff", "#aaaaaa"];

/// `text` with what XML and HTML read as markup replaced.
pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

fn style() -> String {
    let scheme = |ink: &str, faint: &str, colours: [&str; 7]| {
        let mut css = format!(".sp{{--sp-ink:{ink};--sp-faint:{faint}");
        for (i, colour) in colours.iter().enumerate() {
            let _ = write!(css, ";--sp-{i}:{colour}");
        }
        css + "}"
    };
    format!(
        "<style>{}@media (prefers-color-scheme:dark){{{}}}\
         .sp text{{fill:var(--sp-ink);font:13px system-ui,sans-serif}}.sp .t{{font-weight:600;font-size:15px}}\
         .sp .grid{{stroke:var(--sp-faint);stroke-width:1}}.sp .l{{fill:none;stroke-width:2.2}}\
         .sp .m{{fill:var(--sp-ink)}}</style>",
        scheme("#222", "#ddd", LIGHT),
        scheme("#e8e8e8", "#3a3a3a", DARK)
    )
}

impl Plot {
    /// The plot as an SVG element, to be written to a file or put into a page.
    pub fn to_svg(&self) -> String {
        let (sx, sy) = self.scales();
        let (legend, lines) = self.legend();
        let top = 34.0 + LINE * lines as f64;
        let x_at = |t: f64| LEFT + t * (WIDTH - LEFT - RIGHT);
        let y_at = |t: f64| HEIGHT - BOTTOM - t * (HEIGHT - BOTTOM - top);
        let place = |x: f64, y: f64| Some((x_at(sx.place(x)?), y_at(sy.place(y)?)));
        let mut out = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" class=\"sp\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" \
             aria-label=\"{0}\">{1}<text class=\"t\" x=\"{LEFT}\" y=\"20\">{0}</text>{legend}",
            escape(&self.title),
            style()
        );
        self.grid(&mut out, (&sx, &sy), &x_at, &y_at, top);
        for series in &self.series {
            let colour = series.colour % LIGHT.len();
            match &series.form {
                Form::Band(points) => {
                    let edge = |pick: fn(&(f64, f64, f64)) -> f64| {
                        points.iter().filter_map(|p| place(p.0, pick(p))).collect::<Vec<_>>()
                    };
                    let (low, high) = (edge(|p| p.1), edge(|p| p.2));
                    let path: Vec<_> = high.into_iter().chain(low.into_iter().rev()).collect();
                    let _ = write!(
                        out,
                        "<path d=\"{}Z\" fill=\"var(--sp-{colour})\" fill-opacity=\"0.18\"/>",
                        path_data(&path)
                    );
                }
                Form::Line(points) => {
                    let path: Vec<_> = points.iter().filter_map(|(x, y)| place(*x, *y)).collect();
                    let _ = write!(
                        out,
                        "<path class=\"l\" d=\"{}\" stroke=\"var(--sp-{colour})\"/>",
                        path_data(&path)
                    );
                }
                Form::Points(points) => {
                    for (x, y) in points.iter().filter_map(|(x, y)| place(*x, *y)) {
                        let _ = write!(
                            out,
                            "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\" fill=\"var(--sp-{colour})\" \
                             fill-opacity=\"0.75\"/>"
                        );
                    }
                }
            }
        }
        for mark in &self.marks {
            let Some((x, y)) = place(mark.x, mark.y) else { continue };
            // On the right half a label stands to the left of its point, so that it stays inside.
            let (anchor, dx) = if x > WIDTH / 2.0 { ("end", -8.0) } else { ("start", 8.0) };
            let _ = write!(
                out,
                "<circle class=\"m\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4.5\"/><text x=\"{:.1}\" y=\"{:.1}\" \
                 text-anchor=\"{anchor}\">{}</text>",
                x + dx,
                y - 9.0,
                escape(&mark.label)
            );
        }
        out + "</svg>"
    }

    /// The legend's elements and how many lines they take.
    fn legend(&self) -> (String, usize) {
        let (mut x, mut line) = (LEFT, 0);
        let mut out = String::new();
        for series in self.series.iter().filter(|s| !s.name.is_empty()) {
            let width = 34.0 + LETTER * series.name.chars().count() as f64;
            if x > LEFT && x + width > WIDTH - RIGHT {
                (x, line) = (LEFT, line + 1);
            }
            let y = 34.0 + LINE * line as f64;
            let colour = series.colour % LIGHT.len();
            let fill = format!("fill=\"var(--sp-{colour})\"");
            let _ = match series.form {
                Form::Line(_) => {
                    write!(out, "<rect x=\"{x}\" y=\"{}\" width=\"18\" height=\"3\" {fill}/>", y + 6.0)
                }
                Form::Points(_) => write!(
                    out,
                    "<rect x=\"{}\" y=\"{}\" width=\"6\" height=\"6\" rx=\"3\" {fill}/>",
                    x + 6.0,
                    y + 4.0
                ),
                Form::Band(_) => {
                    write!(
                        out,
                        "<rect x=\"{x}\" y=\"{y}\" width=\"18\" height=\"14\" {fill} fill-opacity=\"0.25\"/>"
                    )
                }
            };
            let _ =
                write!(out, "<text x=\"{}\" y=\"{}\">{}</text>", x + 23.0, y + 12.0, escape(&series.name));
            x += width;
        }
        let lines = if out.is_empty() { 0 } else { line + 1 };
        (out, lines)
    }

    fn grid(
        &self,
        out: &mut String,
        (sx, sy): (&Scale, &Scale),
        x_at: &dyn Fn(f64) -> f64,
        y_at: &dyn Fn(f64) -> f64,
        top: f64,
    ) {
        for (x, t) in sx.ticks(7).into_iter().filter_map(|x| Some((x, x_at(sx.place(x)?)))) {
            let _ = write!(
                out,
                "<path class=\"grid\" d=\"M{t:.1} {top:.1}V{:.1}\"/><text x=\"{t:.1}\" y=\"{:.1}\" \
                 text-anchor=\"middle\">{}</text>",
                HEIGHT - BOTTOM,
                HEIGHT - BOTTOM + 18.0,
                escape(&self.x.unit.show(x))
            );
        }
        for (y, t) in sy.ticks(6).into_iter().filter_map(|y| Some((y, y_at(sy.place(y)?)))) {
            let _ = write!(
                out,
                "<path class=\"grid\" d=\"M{LEFT} {t:.1}H{:.1}\"/><text x=\"{:.1}\" y=\"{:.1}\" \
                 text-anchor=\"end\">{}</text>",
                WIDTH - RIGHT,
                LEFT - 7.0,
                t + 4.0,
                escape(&self.y.unit.show(y))
            );
        }
        let middle = y_at(0.5);
        let _ = write!(
            out,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text><text x=\"16\" y=\"{middle:.1}\" \
             transform=\"rotate(-90 16 {middle:.1})\" text-anchor=\"middle\">{}</text>",
            x_at(0.5),
            HEIGHT - 12.0,
            escape(&self.x.label),
            escape(&self.y.label),
        );
    }
}

fn path_data(points: &[(f64, f64)]) -> String {
    let mut out = String::new();
    for (i, (x, y)) in points.iter().enumerate() {
        let _ = write!(out, "{}{x:.1} {y:.1}", if i == 0 { 'M' } else { 'L' });
    }
    out
}
