//! What a benchmark ran on, and what may have changed its figures meanwhile.

use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

use super::place::Bed;
use super::results::Machine;
use crate::backend::profile::{Kind, Told};

/// A clock that falls below this share of what it was is noted.
const FELL: f64 = 0.95;

/// What of the machine changes from moment to moment.
struct Moment {
    /// MHz of the processor, where the system tells.
    clock_mhz: Option<f64>,
    /// Runnable programs, over the last minute.
    load: Option<f64>,
    /// How often the processors were taken away to keep to a limit.
    throttled: Option<u64>,
    /// Ticks of all processors: all, those that were idle, those that other machines took.
    ticks: Option<[u64; 3]>,
    /// Ticks that this program has used.
    own: Option<u64>,
    device: Told,
}

/// Watches the machine from its beginning on.
pub struct Watch {
    machine: Machine,
    before: Moment,
}

fn read(path: &str) -> Option<String> {
    std::fs::read_to_string(path).ok()
}

/// The value of `name : value` or `name value` in a text of lines.
fn field(text: &str, name: &str) -> Option<String> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    Some(line.trim_start_matches([' ', '\t', ':']).trim().to_owned())
}

/// MHz of the processor, where the system tells.
fn clock_of_processor() -> Option<f64> {
    let of_governor = read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq");
    match of_governor.and_then(|khz| khz.trim().parse::<f64>().ok()) {
        Some(khz) => Some(khz / 1e3),
        None => field(&read("/proc/cpuinfo")?, "cpu MHz").and_then(|mhz| mhz.parse().ok()),
    }
}

/// What was seen of a device's clocks behind its work: between two moments, before and after all, they may fall and rise again.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Seen {
    looks: usize,
    /// The lowest and the highest clock, in MHz, where it is told.
    clock_mhz: Option<[f64; 2]>,
    /// What held the clocks back, and at how many looks.
    held_back: BTreeMap<&'static str, usize>,
}

impl Seen {
    /// Looks once.
    pub fn look<B: Bed>(&mut self, backend: &B) {
        let told = backend.told();
        let clock = if backend.kind() == Kind::Host { clock_of_processor() } else { told.clock_mhz.map(f64::from) };
        self.note(clock, &told.held_back);
    }

    fn note(&mut self, clock_mhz: Option<f64>, held_back: &[&'static str]) {
        self.looks += 1;
        if let Some(now) = clock_mhz {
            let [least, most] = self.clock_mhz.unwrap_or([now; 2]);
            self.clock_mhz = Some([least.min(now), most.max(now)]);
        }
        for reason in held_back {
            *self.held_back.entry(reason).or_default() += 1;
        }
    }

    /// What of it may have changed figures, in words.
    fn notes(&self, device: &str) -> Vec<String> {
        let fell = self.clock_mhz.filter(|[least, most]| *least < FELL * most);
        let fell = fell
            .map(|[least, most]| format!("{device}'s clock was between {least:.0} and {most:.0} MHz behind figures"));
        let held = self.held_back.iter().map(|(reason, count)| {
            format!("{device}'s clocks were held back behind {count} of {} figures and tries: {reason}", self.looks)
        });
        fell.into_iter().chain(held).collect()
    }
}

impl Moment {
    fn now<B: Bed>(backend: &B) -> Self {
        let stat = read("/proc/stat").unwrap_or_default();
        let ticks = field(&stat, "cpu ").map(|line| {
            let ticks: Vec<u64> = line.split_whitespace().filter_map(|tick| tick.parse().ok()).collect();
            let at = |place: usize| ticks.get(place).copied().unwrap_or(0);
            // Guests are counted among the users already.
            [ticks.iter().take(8).sum(), at(3) + at(4), at(7)]
        });
        // Behind the name, which may hold anything: user and system time are the twelfth and thirteenth.
        let own = read("/proc/self/stat").and_then(|stat| {
            let fields: Vec<u64> =
                stat.rsplit(')').next()?.split_whitespace().map(|field| field.parse().unwrap_or(0)).collect();
            Some(fields.get(11)? + fields.get(12)?)
        });
        Moment {
            clock_mhz: clock_of_processor(),
            load: read("/proc/loadavg").and_then(|text| text.split(' ').next()?.parse().ok()),
            throttled: read("/sys/fs/cgroup/cpu.stat").and_then(|text| field(&text, "nr_throttled")?.parse().ok()),
            ticks,
            own,
            device: backend.told(),
        }
    }
}

impl Watch {
    /// Looks at the machine before anything is timed.
    pub fn begin<B: Bed>(backend: &B) -> Self {
        let before = Moment::now(backend);
        let mut machine = Machine { device: backend.description(), ..Machine::default() };
        let mut fact = |name: &str, value: Option<String>| {
            if let Some(value) = value.filter(|value| !value.is_empty()) {
                machine.facts.insert(name.to_owned(), value);
            }
        };
        let cpuinfo = read("/proc/cpuinfo").unwrap_or_default();
        fact("processor", field(&cpuinfo, "model name"));
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        fact("processors that may be used", Some(cores.to_string()));
        fact("cores a socket", field(&cpuinfo, "cpu cores"));
        fact("threads", Some(rayon::current_num_threads().to_string()));
        fact("memory", read("/proc/meminfo").and_then(|text| field(&text, "MemTotal")));
        fact("kernel", read("/proc/sys/kernel/osrelease").map(|text| text.trim().to_owned()));
        fact("system", read("/etc/os-release").and_then(|text| Some(field(&text, "PRETTY_NAME=")?.replace('"', ""))));
        fact("governor", read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").map(|g| g.trim().to_owned()));
        fact("limit of processors", read("/sys/fs/cgroup/cpu.max").map(|text| text.trim().to_owned()));
        fact("limit of memory", read("/sys/fs/cgroup/memory.max").map(|text| text.trim().to_owned()));
        fact("hypervisor", cpuinfo.contains(" hypervisor").then(|| "yes: a virtual machine".to_owned()));
        fact("caches", Some(caches(backend)));
        fact("load before", before.load.map(|load| load.to_string()));
        fact("clock before", before.clock_mhz.map(|mhz| format!("{mhz:.0} MHz")));
        fact("device before", Some(before.device.now.clone()));
        for (name, value) in &before.device.facts {
            fact(name, Some(value.clone()));
        }
        if backend.kind() == Kind::Emulated {
            machine.notes.push("emulated device: no time of it says anything; no figure is to be quoted".to_owned());
        }
        Watch { machine, before }
    }

    /// What it was all along.
    pub fn so_far(&self) -> &Machine {
        &self.machine
    }

    /// Looks again when all is timed, and notes what changed, and what was seen meanwhile.
    pub fn end<B: Bed>(self, backend: &B, seen: &Seen) -> Machine {
        let Watch { mut machine, before } = self;
        let after = Moment::now(backend);
        let mut fact = |name: &str, value: Option<String>| {
            if let Some(value) = value.filter(|value| !value.is_empty()) {
                machine.facts.insert(name.to_owned(), value);
            }
        };
        fact("load after", after.load.map(|load| load.to_string()));
        fact("clock after", after.clock_mhz.map(|mhz| format!("{mhz:.0} MHz")));
        fact("device after", Some(after.device.now.clone()));
        let notes = &mut machine.notes;
        let mut fell = |what: &str, before: Option<f64>, after: Option<f64>| {
            if let (Some(before), Some(after)) = (before, after)
                && after < FELL * before
            {
                notes.push(format!("{what} fell from {before:.0} to {after:.0} MHz"));
            }
        };
        fell("the processor's clock", before.clock_mhz, after.clock_mhz);
        fell("the device's clock", before.device.clock_mhz.map(f64::from), after.device.clock_mhz.map(f64::from));
        notes.extend(seen.notes(if backend.kind() == Kind::Host { "the processor" } else { "the device" }));
        let unseen = |reason: &&&str| !seen.held_back.contains_key(**reason);
        for reason in after.device.held_back.iter().chain(&before.device.held_back).filter(unseen) {
            let note = format!("the device's clocks were held back: {reason}");
            if !notes.contains(&note) {
                notes.push(note);
            }
        }
        if let (Some(before), Some(after)) = (before.throttled, after.throttled)
            && after > before
        {
            notes.push(format!("a limit of this group of programs took the processors away {} times", after - before));
        }
        if let (Some(from), Some(to)) = (before.ticks, after.ticks) {
            let [all, idle, stolen] = [0, 1, 2].map(|at| to[at].saturating_sub(from[at]) as f64);
            let own = after.own.unwrap_or(0).saturating_sub(before.own.unwrap_or(0)) as f64;
            let share = |ticks: f64| 100.0 * ticks / all.max(1.0);
            let others = share((all - idle - stolen - own).max(0.0));
            if others > 2.0 {
                notes.push(format!("other programs took {others:.0} % of the processors meanwhile"));
            }
            if share(stolen) > 1.0 {
                notes.push(format!("other virtual machines took {:.0} % of the processors", share(stolen)));
            }
        }
        machine
    }
}

/// `L1 64 KiB, L2 2048 KiB, last 32768 KiB`.
fn caches<B: Bed>(backend: &B) -> String {
    let inner = backend.inner_caches().into_iter().map(|(name, bytes)| format!("{name} {} KiB", bytes >> 10));
    inner.chain([format!("last {} KiB", backend.cache_bytes() >> 10)]).collect::<Vec<_>>().join(", ")
}

/// Now, as RFC 3339 in UTC.
pub fn date() -> String {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    rfc_3339(seconds)
}

/// Seconds since 1970 as RFC 3339 (days to a date by the method of Hinnant's `civil_from_days`, years beginning in March).
fn rfc_3339(seconds: u64) -> String {
    let (days, second) = (seconds / 86_400 + 719_468, seconds % 86_400);
    let (era, of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let [hour, minute, second] = [second / 3600, second / 60 % 60, second % 60];
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clocks_that_fall_and_rise_again_between_figures_are_noted() {
        let mut seen = Seen::default();
        for (clock, held_back) in [(1980.0, &[][..]), (1410.0, &["power cap"]), (1980.0, &["power cap"])] {
            seen.note(Some(clock), held_back);
        }
        let expected = [
            "the device's clock was between 1410 and 1980 MHz behind figures",
            "the device's clocks were held back behind 2 of 3 figures and tries: power cap",
        ];
        assert_eq!(seen.notes("the device"), expected);
        let mut steady = Seen::default();
        for clock in [1980.0, 1965.0] {
            steady.note(Some(clock), &[]);
        }
        assert_eq!(steady.notes("the device"), Vec::<String>::new());
    }

    #[test]
    fn dates_are_those_of_the_calendar() {
        for (seconds, expected) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
            (1_795_608_000, "2026-11-25T12:00:00Z"),
        ] {
            assert_eq!(rfc_3339(seconds), expected);
        }
    }
}
