//! The table in the terminal, and how to read it.

use super::results::{Figure, Machine, Results};
use super::speeds::Speeds;
use super::together::COMMUNICATION;

/// Widths of the columns: what, time, spread, speed, floor, per cent.
const WHAT: usize = 44;

/// Seconds in a unit that suits them.
pub fn seconds(seconds: f64) -> String {
    let (value, unit) = match seconds {
        s if s >= 1.0 => (s, "s"),
        s if s >= 1e-3 => (s * 1e3, "ms"),
        s if s >= 1e-6 => (s * 1e6, "us"),
        s => (s * 1e9, "ns"),
    };
    let digits = if value >= 100.0 { 0 } else { 3 - (value.max(1.0).log10().floor() as usize + 1) };
    format!("{value:.digits$} {unit}")
}

/// A number with a prefix, in three digits: `12.3 k`, `4.56 M`.
fn scaled(value: f64, unit: &str) -> String {
    let (value, prefix) = match value {
        v if v >= 1e12 => (v / 1e12, "T"),
        v if v >= 1e9 => (v / 1e9, "G"),
        v if v >= 1e6 => (v / 1e6, "M"),
        v if v >= 1e3 => (v / 1e3, "k"),
        v => (v, ""),
    };
    let digits = if value >= 100.0 { 0 } else { 3 - (value.max(1.0).log10().floor() as usize + 1) };
    format!("{value:.digits$} {prefix}{unit}")
}

/// A figure's speed in its natural unit.
pub fn speed(figure: &Figure) -> String {
    let median = figure.seconds.median;
    if median.is_nan() || median <= 0.0 {
        return String::new();
    }
    let (amount, of) = &figure.amount;
    let (bytes, flops) = (figure.bytes.unwrap_or(0.0), figure.flops.unwrap_or(0.0));
    match of.as_str() {
        "byte" | "parameter" if flops == 0.0 => scaled(bytes / median, "B/s"),
        "flop" | "parameter" => scaled(flops / median, "FLOP/s"),
        // Whichever its floor is about.
        "call" if figure.floor.as_ref().is_some_and(|floor| floor.what.contains("FLOP")) => {
            scaled(flops / median, "FLOP/s")
        }
        "call" => scaled(bytes / median, "B/s"),
        "time" => String::new(),
        of => scaled(amount / median, &format!("{of}s/s")),
    }
}

/// The head of the table: what the machine is and how fast.
pub fn head(machine: &Machine, speeds: &Speeds) -> String {
    let fact = |name: &str| machine.facts.get(name).map(String::as_str).unwrap_or("unknown");
    let processors = match fact("processors that may be used") {
        "1" => "1 processor".to_owned(),
        several => format!("{several} processors"),
    };
    format!(
        "{}; {}; {processors}, load {} before\nThis run's limits in {}: a copy within memory {}, a pass in place {}, the fastest \
         product {}\n",
        machine.device,
        fact("processor"),
        fact("load before"),
        speeds.precision.name(),
        scaled(speeds.copy, "B/s"),
        scaled(speeds.in_place, "B/s"),
        scaled(speeds.product, "FLOP/s"),
    )
}

/// The line above a suite's figures.
pub fn suite(name: &str) -> String {
    let about = match name {
        "device" => "what the device can do at all",
        "update" => "the optimizer's step alone, against the bytes that it has to move",
        "kernel" => "single operations, their data out of memory",
        "step" => "whole training steps: forward, loss, backward, clip, update",
        "all_reduce" => "sums over all processes; the speed is the bus bandwidth, by what a ring sends",
        _ => "reading and preparing batches",
    };
    let columns = format!("{:<WHAT$} {:>9} {:>7} {:>16} {:>9} {:>8}", "", "time", "+-", "speed", "floor", "of floor");
    format!("\n{name}: {about}\n{columns}\n")
}

/// A figure's line, and a second one with what a step is made of, or why it is not to be quoted.
pub fn line(figure: &Figure) -> String {
    let spread = &figure.seconds;
    if spread.count == 0 {
        let why = figure.refused.as_deref().unwrap_or("not taken");
        return format!("{:<WHAT$} not taken: {why}\n", figure.name);
    }
    let around = 50.0 * (spread.upper_quartile - spread.lower_quartile) / spread.median;
    let floor = figure.floor.as_ref();
    let text = format!(
        "{:<WHAT$} {:>9} {:>7} {:>16} {:>9} {:>8}",
        figure.name,
        seconds(spread.median),
        format!("{around:.0} %"),
        speed(figure),
        floor.map_or_else(String::new, |floor| seconds(floor.seconds)),
        floor.map_or_else(String::new, |floor| format!("{:.0} %", 100.0 * floor.seconds / spread.median)),
    );
    let mut text = text.trim_end().to_owned() + "\n";
    if !figure.parts.is_empty() {
        let mut parts: Vec<(&String, &f64)> = figure.parts.iter().collect();
        parts.sort_by(|a, b| b.1.total_cmp(a.1));
        let parts: Vec<String> =
            parts.into_iter().map(|(name, share)| format!("{name} {:.0} %", 100.0 * share)).collect();
        let memory =
            figure.memory_bytes.map_or_else(String::new, |bytes| format!("; memory {}", scaled(bytes as f64, "B")));
        text += &format!("    {}{memory}\n", parts.join(", "));
    }
    if let Some(why) = floor.and_then(|floor| floor.doubt.as_ref()) {
        text += &format!("    its floor is not to be quoted: {why}\n");
    }
    if let Some(why) = &figure.refused {
        text += &format!("    not to be quoted: {why}\n");
    }
    text
}

/// What stands below the table: how to read it, and what may have changed it.
pub fn foot(results: &Results) -> String {
    let refused = results.figures.iter().filter(|figure| figure.refused.is_some()).count();
    let mut text = "\nHow to read this: time is the median of one repetition, +- half the distance between its quartiles. The floor is \
        the time that the same bytes take at the speed of a copy, or of a pass in place where that is faster (what a kernel reads \
        alone or writes alone: of a pass that does no other), or the same arithmetic at the speed of the fastest product, all \
        measured in this run; \"of floor\" is floor over time, and for a training step the model FLOP utilization. 100 % is as \
        fast as this run has seen the machine; more than 110 % is refused, but for convolutions of 3 x 3, which Winograd's method \
        does with fewer operations than are counted. "
        .to_owned();
    if results.figures.iter().any(|figure| figure.parts.contains_key(COMMUNICATION)) {
        text += "Communication is what a step of all processes takes longer than the same step by each of them alone, all at the same \
                 time: 10 % of it is a scaling efficiency of 90 %. ";
    }
    text += match refused {
        0 => "No figure was refused.",
        _ => {
            "A figure that is not to be quoted says why: most often something else ran meanwhile; the comparison of two machines \
             needs figures without that line."
        }
    };
    let mut text = wrapped(&text);
    for note in &results.machine.notes {
        text += &format!("note: {note}\n");
    }
    text
}

/// Lines of at most 100 characters.
fn wrapped(text: &str) -> String {
    let (mut out, mut width) = ("\n".to_owned(), 0);
    for word in text.split_whitespace() {
        if width > 0 && width + 1 + word.len() > 100 {
            out.push('\n');
            width = 0;
        } else if width > 0 {
            out.push(' ');
            width += 1;
        }
        out += word;
        width += word.len();
    }
    out + "\n"
}

#[cfg(test)]
mod tests {
    use super::super::results::{Floor, Spread};
    use super::*;

    fn figure(amount: (f64, &str), bytes: Option<f64>, flops: Option<f64>) -> Figure {
        let spread = Spread { count: 9, min: 1.0e-3, lower_quartile: 1.9e-3, median: 2.0e-3, upper_quartile: 2.1e-3 };
        Figure {
            suite: "step".into(),
            name: "mlp".into(),
            seconds: spread,
            amount: (amount.0, amount.1.into()),
            bytes,
            flops,
            floor: Some(Floor { seconds: 1.0e-3, what: "its MB".into(), doubt: None }),
            ..Figure::default()
        }
    }

    #[test]
    fn a_speed_is_told_in_the_unit_of_what_was_done() {
        assert_eq!(speed(&figure((128.0, "sample"), None, Some(1.0))), "64.0 ksamples/s");
        assert_eq!(speed(&figure((4e6, "byte"), Some(4e6), None)), "2.00 GB/s");
        assert_eq!(speed(&figure((1e6, "parameter"), Some(24e6), None)), "12.0 GB/s");
        assert_eq!(speed(&figure((4e8, "flop"), Some(1.0), Some(4e8))), "200 GFLOP/s");
        assert_eq!(speed(&figure((1.0, "time"), None, None)), "");
    }

    #[test]
    fn a_line_tells_the_spread_the_share_of_the_floor_and_why_it_is_refused() {
        let mut figure = figure((128.0, "sample"), None, None);
        figure.refused = Some("spread too wide".into());
        figure.floor.as_mut().unwrap().doubt = Some("the product was refused".into());
        let text = line(&figure);
        for part in [
            "mlp",
            "2.00 ms",
            "5 %",
            "64.0 ksamples/s",
            "1.00 ms",
            "50 %",
            "    not to be quoted: spread too wide",
            "    its floor is not to be quoted: the product was refused",
        ] {
            assert!(text.contains(part), "{part} in {text}");
        }
    }
}
