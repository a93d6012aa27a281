//! How fast the device is, as this run has seen it: what floors are computed from.

use super::device::{ProductTask, TrafficTask};
use super::measure::{Asked, Ground, Settings, measure, width};
use super::place::{Bed, Precision};
use super::results::{Figure, Floor, Limits};
use crate::backend::profile::{Kind, Traffic};
use crate::error::Result;

/// Speeds of a device in a precision.
#[derive(Clone, Debug, PartialEq)]
pub struct Speeds {
    /// The precision of products.
    pub precision: Precision,
    /// Bytes a second of a copy within the memory, those read and those written together.
    pub copy: f64,
    /// The same of memory that is read and written where it is.
    pub in_place: f64,
    /// Bytes a second of memory that is read alone, and of memory that is written alone.
    pub alone: [f64; 2],
    /// The fastest bytes a second seen of the memory: copied, read, written, or both where they are.
    pub fastest_memory: f64,
    /// Floating-point operations a second of the fastest product.
    pub product: f64,
    /// What nothing can be faster than: `product`, and some more, since no shape was tried that could not be.
    pub fastest_product: f64,
    /// Why floors of memory are not to be quoted, where they are not.
    pub memory_doubt: Option<String>,
    /// The same of what is read alone, and written alone.
    pub alone_doubts: [Option<String>; 2],
    /// Why floors of products are not to be quoted, where they are not.
    pub product_doubt: Option<String>,
}

/// Shapes of products of which the fastest counts: rows, inputs, outputs.
fn shapes<B: Bed>(backend: &B) -> Vec<[usize; 3]> {
    match backend.kind() {
        Kind::Host => vec![[1024; 3], [256, 768, 3072], [128, 784, 256]],
        Kind::Gpu => vec![[8192; 3], [8192, 4096, 4096], [4096; 3]],
        Kind::Emulated => vec![[32; 3]],
    }
}

/// How much faster than the fastest product that was tried another may be.
const UNTRIED: f64 = 1.25;
/// How much a speed may change while figures are taken.
const DRIFT: f64 = 0.1;

/// What a reference came to: amounts a second by the median, by the quickest quarter, and at best; and why it is not to be quoted.
struct Reference {
    median: f64,
    quick: f64,
    best: f64,
    doubt: Option<String>,
}

impl Reference {
    fn new(amount: f64, figure: Figure, widest: f64, what: &str) -> Self {
        let times = &figure.seconds;
        let wide = width(times);
        // Figures that are refused for their spread say so at length.
        let why = match figure.refused {
            Some(_) if wide > widest => {
                Some(format!("spread too wide: quartiles {:.0} % of the median apart", 100.0 * wide))
            }
            refused => refused,
        };
        let doubt = why.map(|why| format!("{what} that it is computed from was refused: {why}"));
        Reference {
            median: amount / times.median,
            quick: amount / times.lower_quartile,
            best: amount / times.min,
            doubt,
        }
    }
}

/// How memory is gone through, as errors and floors call it.
pub(super) fn words(traffic: Traffic) -> &'static str {
    match traffic {
        Traffic::Copy => "a copy",
        Traffic::Read => "a pass that reads",
        Traffic::Write => "a pass that writes",
        Traffic::InPlace => "a pass in place",
    }
}

fn plain(name: &str) -> Asked<'static> {
    Asked {
        figure: Figure { suite: "device".to_owned(), name: name.to_owned(), ..Figure::default() },
        limit: &|_| None,
    }
}

fn memory<B: Bed>(backend: &B, ground: &dyn Ground, settings: &Settings, traffic: Traffic) -> Result<Reference> {
    let mut task = TrafficTask::in_memory(backend, traffic)?;
    let figure = measure(ground, settings, &mut task, None, plain("memory"))?;
    Ok(Reference::new(task.bytes(), figure, settings.widest, words(traffic)))
}

fn product<B: Bed>(
    backend: &B,
    ground: &dyn Ground,
    settings: &Settings,
    shapes: Vec<[usize; 3]>,
) -> Result<Reference> {
    let mut fastest: Option<Reference> = None;
    for shape in shapes {
        let mut task = ProductTask::new(backend, shape)?;
        let figure = measure(ground, settings, &mut task, None, plain("product"))?;
        let found = Reference::new(task.flops(), figure, settings.widest, "the product");
        if fastest.as_ref().is_none_or(|fastest| found.quick > fastest.quick) {
            fastest = Some(found);
        }
    }
    Ok(fastest.unwrap_or(Reference { median: f64::NAN, quick: f64::NAN, best: f64::NAN, doubt: None }))
}

impl Speeds {
    /// Where nothing is timed.
    pub(super) fn unknown(precision: Precision) -> Self {
        let none = f64::NAN;
        Speeds {
            precision,
            copy: none,
            in_place: none,
            alone: [none; 2],
            fastest_memory: none,
            product: none,
            fastest_product: none,
            memory_doubt: None,
            alone_doubts: [None, None],
            product_doubt: None,
        }
    }

    /// Measures them. The median counts for passes through memory, the quickest quarter for the product, the fastest of all for limits.
    /// What is refused is measured again, as often as the settings allow; where it is refused then too, floors are not to be quoted.
    ///
    /// # Errors
    /// Not enough memory, or a device that failed.
    pub fn measure<B: Bed>(
        backend: &B,
        ground: &dyn Ground,
        settings: &Settings,
        precision: Precision,
    ) -> Result<Self> {
        let [copy, in_place, read, write] = [Traffic::Copy, Traffic::InPlace, Traffic::Read, Traffic::Write]
            .map(|traffic| memory(backend, ground, settings, traffic));
        let (copy, in_place, read, write) = (copy?, in_place?, read?, write?);
        let product = product(backend, ground, settings, shapes(backend))?;
        let passes = [copy.best, in_place.best, read.best, write.best];
        let faster = if in_place.median > copy.median { &in_place } else { &copy };
        // A device whose times say nothing is told of with each figure.
        let told = |doubt: &Option<String>| if ground.refusal().is_some() { None } else { doubt.clone() };
        Ok(Speeds {
            precision,
            copy: copy.median,
            in_place: in_place.median,
            alone: [read.median, write.median],
            fastest_memory: passes.into_iter().fold(0.0, f64::max),
            product: product.quick,
            fastest_product: UNTRIED * product.quick,
            memory_doubt: told(&faster.doubt),
            alone_doubts: [told(&read.doubt), told(&write.doubt)],
            product_doubt: told(&product.doubt),
        })
    }

    /// How memory is gone through fastest, of a copy and a pass in place: what floors of memory are computed from. A copy reads the
    /// lines of the cache that it writes, where it does not pass by them, and a pass in place does not.
    pub fn pass(&self) -> Traffic {
        if self.in_place > self.copy { Traffic::InPlace } else { Traffic::Copy }
    }

    /// Bytes a second of that pass, those read and those written together.
    pub fn memory(&self) -> f64 {
        self.copy.max(self.in_place)
    }

    /// The least time of so many bytes that are read and so many that are written: as many of both as there are go at the speed of
    /// [`Self::pass`], and what is left of one alone, where that is faster, as memory is read alone or written alone.
    pub fn least_of(&self, bytes: [f64; 2]) -> Floor {
        let [read, written] = bytes;
        let paired = 2.0 * read.min(written);
        let number = usize::from(written > read);
        let (alone, speed) = ((read - written).abs(), self.alone[number]);
        let pass = format!("the speed of {}, {:.1} GB/s", words(self.pass()), self.memory() / 1e9);
        // Written so that a speed which is no number is none.
        if alone > 0.0 && speed > self.memory() {
            let of_pair = if paired > 0.0 { format!("{:.2} MB at {pass}, and ", paired / 1e6) } else { String::new() };
            let way = words([Traffic::Read, Traffic::Write][number]);
            return Floor {
                seconds: paired / self.memory() + alone / speed,
                what: format!("its {of_pair}{:.2} MB at the speed of {way}, {:.1} GB/s", alone / 1e6, speed / 1e9),
                doubt: self.memory_doubt.clone().filter(|_| paired > 0.0).or_else(|| self.alone_doubts[number].clone()),
            };
        }
        let (seconds, megabytes) = ((read + written) / self.memory(), (read + written) / 1e6);
        Floor { seconds, what: format!("its {megabytes:.2} MB at {pass}"), doubt: self.memory_doubt.clone() }
    }

    /// `227 GFLOP/s in f32`.
    pub fn product_text(&self) -> String {
        format!("{:.0} GFLOP/s in {}", self.product / 1e9, self.precision.name())
    }

    /// As results hold them.
    pub fn limits(&self) -> Limits {
        // JSON has no other numbers.
        let finite = |speed: f64| if speed.is_finite() { speed } else { 0.0 };
        Limits {
            precision: self.precision.name().to_owned(),
            copy: finite(self.copy),
            in_place: finite(self.in_place),
            product: finite(self.product),
            doubts: self.memory_doubt.iter().chain(&self.product_doubt).cloned().collect(),
        }
    }

    /// Measures the pass through memory and the product again, behind the figures: what of both has changed too much for floors, in
    /// words.
    ///
    /// # Errors
    /// Not enough memory, or a device that failed.
    pub fn drift<B: Bed>(&self, backend: &B, ground: &dyn Ground, settings: &Settings) -> Result<Vec<String>> {
        let memory = memory(backend, ground, settings, self.pass())?;
        let product = product(backend, ground, settings, shapes(backend))?;
        let precision = self.precision.name();
        let notes = [
            changed(words(self.pass()), [self.memory(), memory.median], "GB/s", precision),
            changed("the fastest product", [self.product, product.quick], "GFLOP/s", precision),
        ];
        Ok(notes.into_iter().flatten().collect())
    }
}

/// That a speed is another behind the figures than before them, where that is too much for floors.
fn changed(what: &str, [before, after]: [f64; 2], unit: &str, precision: &str) -> Option<String> {
    let change = (after / before - 1.0).abs();
    (change > DRIFT).then(|| {
        format!(
            "{what}, which floors are computed from, came to {:.1} {unit} before the figures in {precision} and to {:.1} {unit} behind \
             them: shares of floors are uncertain by {:.0} %",
            before / 1e9,
            after / 1e9,
            100.0 * change
        )
    })
}

#[cfg(test)]
mod tests {
    use super::super::measure::spread;
    use super::*;

    #[test]
    fn floors_of_memory_are_those_of_the_faster_pass() {
        let speeds = |copy, in_place| Speeds { copy, in_place, ..Speeds::unknown(Precision::F32) };
        assert_eq!((speeds(2e10, 1e10).pass(), speeds(2e10, 1e10).memory()), (Traffic::Copy, 2e10));
        assert_eq!((speeds(1e10, 2e10).pass(), speeds(1e10, 2e10).memory()), (Traffic::InPlace, 2e10));
    }

    #[test]
    fn what_is_read_or_written_alone_goes_by_the_faster_of_its_own_speed_and_that_of_the_pass() {
        let speeds = Speeds {
            copy: 2e10,
            in_place: 1e10,
            alone: [4e10, 1e10],
            alone_doubts: [Some("read".to_owned()), None],
            ..Speeds::unknown(Precision::F32)
        };
        let both = speeds.least_of([1e7, 1e7]);
        assert_eq!((both.seconds, both.doubt), (1e-3, None));
        assert_eq!(both.what, "its 20.00 MB at the speed of a copy, 20.0 GB/s");
        let mostly_read = speeds.least_of([3e7, 1e7]);
        assert_eq!((mostly_read.seconds, mostly_read.doubt.as_deref()), (1.5e-3, Some("read")));
        assert_eq!(
            mostly_read.what,
            "its 20.00 MB at the speed of a copy, 20.0 GB/s, and 20.00 MB at the speed of a pass that reads, 40.0 GB/s"
        );
        let all_read = speeds.least_of([4e7, 0.0]);
        assert_eq!(
            (all_read.seconds, all_read.what.as_str()),
            (1e-3, "its 40.00 MB at the speed of a pass that reads, 40.0 GB/s")
        );
        // A pass that writes is slower than a copy here, which is no bound.
        let mostly_written = speeds.least_of([1e7, 3e7]);
        assert_eq!((mostly_written.seconds, mostly_written.doubt), (2e-3, None));
    }

    #[test]
    fn a_reference_that_was_refused_says_why_its_floors_are_not_to_be_quoted() {
        let found = |times: &[f64], refused: Option<&str>| {
            let figure = Figure { seconds: spread(times), refused: refused.map(str::to_owned), ..Figure::default() };
            Reference::new(1.0, figure, 0.2, "a copy")
        };
        assert_eq!(found(&[1.0, 1.0, 1.1], None).doubt, None);
        let wide = found(&[1.0, 1.0, 2.0, 2.0], Some("spread too wide: and so on"));
        let told = wide.doubt.as_deref();
        assert_eq!(
            told,
            Some("a copy that it is computed from was refused: spread too wide: quartiles 67 % of the median apart")
        );
        let wrong = found(&[1.0], Some("wrong outcome")).doubt;
        assert_eq!(wrong.as_deref(), Some("a copy that it is computed from was refused: wrong outcome"));
    }

    #[test]
    fn a_speed_that_changed_by_more_than_a_tenth_is_noted() {
        assert_eq!(changed("a copy", [2e10, 2.1e10], "GB/s", "f32"), None);
        let note = changed("a copy", [2e10, 1.5e10], "GB/s", "bf16").unwrap();
        assert!(
            note.starts_with("a copy, which floors are computed from, came to 20.0 GB/s before the figures in bf16"),
            "{note}"
        );
        assert!(note.ends_with("15.0 GB/s behind them: shares of floors are uncertain by 25 %"), "{note}");
    }
}
