//! The few elements of SVG that the plots need.

use std::fmt::Write as _;

/// How a text stands to its point.
#[derive(Clone, Copy)]
pub(super) enum Anchor {
    Start,
    Middle,
    End,
}

/// A text's size in px and its looks.
#[derive(Clone, Copy)]
pub(super) struct Font {
    pub(super) size: u32,
    pub(super) bold: bool,
    pub(super) colour: &'static str,
}

pub(super) const TITLE: Font = Font { size: 17, bold: true, colour: "#1c2530" };
pub(super) const SUBTITLE: Font = Font { size: 12, bold: false, colour: "#5b6673" };
pub(super) const LABEL: Font = Font { size: 12, bold: false, colour: "#323c48" };
pub(super) const AXIS: Font = Font { size: 13, bold: false, colour: "#1c2530" };
pub(super) const GRID: &str = "#e4e8ec";
pub(super) const FRAME: &str = "#98a3af";

/// Mean width of a character in [`LABEL`], in px: SVG text has no measure of its own.
pub(super) const LABEL_CHARACTER: f64 = 7.0;

/// Width of a text in [`LABEL`] in px, roughly.
pub(super) fn label_width(text: &str) -> f64 {
    f64::from(u32::try_from(text.chars().count()).unwrap_or(u32::MAX)) * LABEL_CHARACTER
}

/// A file in the making.
pub(super) struct Svg {
    text: String,
}

impl Svg {
    /// A white sheet with a title and a line below it.
    pub(super) fn new(width: f64, height: f64, title: &str, subtitle: &str) -> Self {
        let text = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width:.0}\" height=\"{height:.0}\" \
             viewBox=\"0 0 {width:.0} {height:.0}\" \
             font-family=\"system-ui, 'DejaVu Sans', Helvetica, sans-serif\">\n\
             <title>{}</title>\n",
            escape(title)
        );
        let mut svg = Self { text };
        svg.rect((0.0, 0.0), (width, height), "#ffffff");
        svg.text((20.0, 28.0), Anchor::Start, TITLE, title);
        svg.text((20.0, 47.0), Anchor::Start, SUBTITLE, subtitle);
        svg
    }

    pub(super) fn rect(&mut self, (x, y): (f64, f64), (w, h): (f64, f64), fill: &str) {
        self.push(&format!(
            "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{w:.1}\" height=\"{h:.1}\" fill=\"{fill}\"/>"
        ));
    }

    pub(super) fn line(&mut self, from: (f64, f64), to: (f64, f64), colour: &str, width: f64) {
        self.push(&format!(
            "<line x1=\"{:.1}\" y1=\"{:.1}\" x2=\"{:.1}\" y2=\"{:.1}\" stroke=\"{colour}\" \
             stroke-width=\"{width}\"/>",
            from.0, from.1, to.0, to.1
        ));
    }

    pub(super) fn curve(&mut self, points: &[(f64, f64)], colour: &str, dashed: bool) {
        let mut list = String::new();
        for (x, y) in points {
            // Writing to a String cannot fail.
            let _infallible = write!(list, "{x:.1},{y:.1} ");
        }
        let dash = if dashed { " stroke-dasharray=\"6 4\"" } else { "" };
        self.push(&format!(
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\" \
             stroke-linejoin=\"round\"{dash}/>",
            list.trim_end()
        ));
    }

    pub(super) fn dot(&mut self, (x, y): (f64, f64), colour: &str) {
        self.push(&format!(
            "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4\" fill=\"{colour}\" stroke=\"#ffffff\"/>"
        ));
    }

    pub(super) fn text(&mut self, at: (f64, f64), anchor: Anchor, font: Font, text: &str) {
        self.turned_text(at, anchor, font, text, 0);
    }

    /// A text turned around its point, in degrees.
    pub(super) fn turned_text(
        &mut self,
        (x, y): (f64, f64),
        anchor: Anchor,
        font: Font,
        text: &str,
        degrees: i32,
    ) {
        let anchor = match anchor {
            Anchor::Start => "start",
            Anchor::Middle => "middle",
            Anchor::End => "end",
        };
        let weight = if font.bold { " font-weight=\"600\"" } else { "" };
        let turn = match degrees {
            0 => String::new(),
            degrees => format!(" transform=\"rotate({degrees} {x:.1} {y:.1})\""),
        };
        self.push(&format!(
            "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" font-size=\"{}\" \
             fill=\"{}\"{weight}{turn}>{}</text>",
            font.size,
            font.colour,
            escape(text)
        ));
    }

    /// A row of coloured labels from the left end `from` on, wrapped at `right`. Returns the y of
    /// the last line.
    pub(super) fn legend(
        &mut self,
        from: (f64, f64),
        right: f64,
        entries: &[(&'static str, String)],
    ) -> f64 {
        let (mut x, mut y) = from;
        for (colour, label) in entries {
            let width = label_width(label) + 38.0;
            if x > from.0 && x + width > right {
                (x, y) = (from.0, y + 19.0);
            }
            self.rect((x, y - 9.0), (14.0, 10.0), colour);
            self.text((x + 20.0, y), Anchor::Start, LABEL, label);
            x += width;
        }
        y
    }

    pub(super) fn finish(mut self) -> String {
        self.push("</svg>");
        self.text
    }

    fn push(&mut self, element: &str) {
        self.text.push_str(element);
        self.text.push('\n');
    }
}

/// Text as XML content and attribute value.
fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
