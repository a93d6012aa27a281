//! How a product's algorithm is chosen: measured once, kept on disk, the same bits from then on.
//!
//! The emulated device's algorithms differ in their order of sums, as a GPU's do, so that the bits tell which one ran.

#[path = "common/device.rs"]
mod device;

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use device::device_with;
use warpstep::backend::cuda::{Cuda, DeviceOptions, SmallProducts};
use warpstep::backend::{Backend, Memory, StepContext};
use warpstep::model::layers::{Linear, Sequential};
use warpstep::model::{Input, Loss, Mode, Model, Value};
use warpstep::random::{Philox, Purpose};

/// The cache of this program alone.
fn cache() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("cuda_products")
}

#[ctor::ctor]
fn use_a_cache_of_its_own() {
    // SAFETY: before main there is one thread.
    unsafe { std::env::set_var("XDG_CACHE_HOME", cache()) };
}

/// An empty cache, for one test at a time.
fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    let guard = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    match std::fs::remove_dir_all(cache()) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => panic!("{error}"),
        _ => guard,
    }
}

fn products() -> PathBuf {
    cache().join("warpstep/products")
}

/// Every choice of an algorithm and its text.
fn entries() -> Vec<(PathBuf, String)> {
    entries_in(&products())
}

/// Every choice of a way: the library's products, or kernels of our own.
fn ways() -> Vec<(PathBuf, String)> {
    entries_in(&cache().join("warpstep/ways"))
}

fn entries_in(folder: &Path) -> Vec<(PathBuf, String)> {
    let Ok(found) = std::fs::read_dir(folder) else { return Vec::new() };
    let mut entries: Vec<_> = found
        .map(|entry| entry.unwrap().path())
        .map(|path| (path.clone(), std::fs::read_to_string(path).unwrap_or_default()))
        .collect();
    entries.sort();
    entries
}

/// An entry with these words for the choice.
fn with_words(text: &str, words: &[u64]) -> String {
    let head: Vec<&str> = text.lines().take(2).collect();
    let mut text = head.join("\n") + "\n";
    words.iter().for_each(|word| text += &format!("{word:016x}\n"));
    let sum = blake3::hash(text.as_bytes()).to_hex();
    text + &sum + "\n"
}

/// The words of an entry's algorithm.
fn words(text: &str) -> [u64; 8] {
    let words: Vec<u64> = text.lines().skip(2).take(8).map(|line| u64::from_str_radix(line, 16).unwrap()).collect();
    words.try_into().unwrap()
}

const MEASURED: fn() -> DeviceOptions = || DeviceOptions { measure: true, ..DeviceOptions::default() };
const PROPOSED: fn() -> DeviceOptions = || DeviceOptions { measure: false, ..DeviceOptions::default() };

/// Bits of the gradients after one batch and three more added to it; none without a device.
fn gradients(options: DeviceOptions) -> Option<Vec<u32>> {
    gradients_of(options, None)
}

/// The same of a run that keeps its choices in a folder.
fn gradients_of(options: DeviceOptions, run: Option<&Path>) -> Option<Vec<u32>> {
    let backend = Cuda::<f32>::new(device_with(options)?);
    run.into_iter().for_each(|run| backend.keep_choices_in(run));
    let (batch, inputs, outputs) = (200, 75, 12);
    let layers = Sequential::new().then("0", Linear::new(64)).then("1", Linear::new(outputs));
    let mut model = Model::new(Box::new(layers), Loss::MeanSquaredError);
    let program = model.plan(&Input::Real(vec![inputs]), batch, Mode::Training).unwrap();
    let mut arena = model.arena(&backend, 1, 0).unwrap();
    let mut activations = program.activations(&backend).unwrap();
    for (number, value) in [program.input, program.target.unwrap()].into_iter().enumerate() {
        let Value::Real(act) = value else { panic!("this model takes real values") };
        let range = activations.range(act);
        let stream = Philox::new(5, Purpose::Augmentation, number as u32);
        let values: Vec<f32> = (0..range.len() as u64).map(|i| stream.normal(i) as f32).collect();
        backend.upload(&mut activations.values, range.start, &values).unwrap();
    }
    for accumulate in [false, true, true, true] {
        let mut memory = Memory { arena: &mut arena, activations: &mut activations };
        let step = StepContext { accumulate, ..StepContext::default() };
        backend.run(&program.ops, &mut memory, &step).unwrap();
    }
    let mut gradients = vec![0.0f32; arena.layout.padded_len()];
    backend.download(&arena.gradients, 0, &mut gradients).unwrap();
    Some(gradients.into_iter().map(f32::to_bits).collect())
}

#[test]
fn what_was_measured_is_kept_and_gives_the_same_bits_from_then_on() {
    let _alone = alone();
    let Some(first) = gradients(MEASURED()) else { return };
    let kept = entries();
    // Two layers: their outputs, one gradient of an input, and gradients of weights, `=` and `+=`.
    assert_eq!(kept.len(), 7, "{kept:?}");
    for _ in 0..2 {
        assert!(gradients(MEASURED()) == Some(first.clone()), "other bits from the algorithms that were kept");
        assert_eq!(entries(), kept);
    }
}

#[test]
fn an_algorithm_that_was_kept_is_the_one_that_runs() {
    let _alone = alone();
    let Some(proposed) = gradients(PROPOSED()) else { return };
    assert_eq!(entries(), [], "what is not measured is not kept");
    gradients(MEASURED());
    // The emulated library's last algorithm splits k into four parts and fits every shape.
    let real = std::env::var("WARPSTEP_TEST_DEVICE").is_ok();
    if real {
        println!("skipped: which algorithms a real library has is not known");
        return;
    }
    for (path, text) in entries() {
        let [mark, ..] = words(&text);
        std::fs::write(path, with_words(&text, &[mark, 3, 0, 0, 0, 0, 0, 0])).unwrap();
    }
    let split = gradients(MEASURED()).unwrap();
    assert!(split != proposed, "the entry was not heeded");
    assert!(gradients(MEASURED()) == Some(split));
    assert!(gradients(PROPOSED()) == Some(proposed), "an entry was heeded where nothing is to be measured");
}

#[test]
fn a_run_takes_what_is_kept_in_its_folder_wherever_it_is_resumed() {
    let _alone = alone();
    let run = tempfile::tempdir().unwrap();
    let Some(proposed) = gradients(PROPOSED()) else { return };
    let begun = gradients_of(MEASURED(), Some(run.path()));
    let (kept, of_run) = (entries(), entries_in(&run.path().join("products")));
    assert_eq!((kept.len(), of_run.len()), (7, 7));
    // On another machine, whose cache has other choices, or none.
    std::fs::remove_dir_all(cache()).unwrap();
    assert!(gradients_of(MEASURED(), Some(run.path())) == begun, "other bits than before it was stopped");
    assert_eq!(entries(), [], "what was known was measured");
    let real = std::env::var("WARPSTEP_TEST_DEVICE").is_ok();
    for (path, text) in of_run.iter().filter(|_| !real) {
        let [mark, ..] = words(text);
        std::fs::write(path, with_words(text, &[mark, 3, 0, 0, 0, 0, 0, 0])).unwrap();
    }
    if !real {
        let split = gradients_of(MEASURED(), Some(run.path()));
        assert!(split.is_some() && split != Some(proposed), "the run's choice was not heeded");
        gradients(MEASURED());
        assert!(gradients_of(MEASURED(), Some(run.path())) == split, "the cache came before the run");
    }
    // A run can keep what a machine cannot.
    std::fs::remove_dir_all(cache()).unwrap();
    std::fs::create_dir_all(cache().join("warpstep")).unwrap();
    std::fs::write(products(), "in the way").unwrap();
    let other = tempfile::tempdir().unwrap();
    gradients_of(MEASURED(), Some(other.path()));
    assert_eq!(entries_in(&other.path().join("products")).len(), 7);
}

#[test]
fn damaged_and_foreign_entries_are_measured_anew() {
    let _alone = alone();
    if gradients(MEASURED()).is_none() {
        return;
    }
    let whole = entries();
    let spoil: [fn(&str) -> String; 5] = [
        |_| String::new(),
        |text| text[..text.len() / 2].into(),
        |text| text.replacen('0', "1", 1),
        |text| text.to_owned() + "\n",
        // Whole, but of another library.
        |text| with_words(text, &[1, 2, 3, 4, 5, 6, 7, 8]),
    ];
    for (number, spoil) in spoil.into_iter().enumerate() {
        for (path, text) in &whole {
            std::fs::write(path, spoil(text)).unwrap();
        }
        let bits = gradients(MEASURED());
        let again = entries();
        assert_eq!(again.len(), whole.len(), "{number}");
        for ((path, text), (_, before)) in again.iter().zip(&whole) {
            assert_eq!(*text, with_words(before, &words(text)), "{number}: {} is whole again", path.display());
            assert_ne!(*text, spoil(before), "{number}");
        }
        assert!(gradients(MEASURED()) == bits, "{number}");
    }
}

#[test]
fn without_a_cache_the_librarys_first_proposal_runs() {
    let _alone = alone();
    std::fs::create_dir_all(cache().join("warpstep")).unwrap();
    std::fs::write(products(), "in the way").unwrap();
    let measured = gradients(MEASURED());
    assert!(measured == gradients(PROPOSED()));
    assert_eq!(std::fs::read_to_string(products()).unwrap(), "in the way");
}

#[test]
fn small_maps_take_the_way_that_was_kept() {
    let _alone = alone();
    let options = |small_products| DeviceOptions { tf32: true, small_products, ..MEASURED() };
    let Some(never) = gradients(options(SmallProducts::Never)) else { return };
    let always = gradients(options(SmallProducts::Always)).unwrap();
    assert!(always != never, "the same bits from other kernels");
    assert_eq!(ways(), [], "what is not measured is not kept");
    let measured = gradients(options(SmallProducts::Measured)).unwrap();
    let kept = ways();
    // Two layers, forward and backward; whether gradients are added to is no question of its own.
    assert_eq!(kept.len(), 4, "{kept:?}");
    assert!(gradients(options(SmallProducts::Measured)) == Some(measured), "other bits from the ways that were kept");
    assert_eq!(ways(), kept);
    for (way, expected) in [&never, &always].into_iter().enumerate() {
        for (path, text) in &kept {
            std::fs::write(path, with_words(text, &[way as u64])).unwrap();
        }
        assert!(gradients(options(SmallProducts::Measured)).as_ref() == Some(expected), "way {way} was not heeded");
    }
    // No third way is there.
    for (path, text) in &kept {
        std::fs::write(path, with_words(text, &[2])).unwrap();
    }
    gradients(options(SmallProducts::Measured)).unwrap();
    for ((_, text), (_, before)) in ways().iter().zip(&kept) {
        assert!([0, 1].iter().any(|&way| *text == with_words(before, &[way])), "{text}");
    }
    let proposed = DeviceOptions { measure: false, ..options(SmallProducts::Measured) };
    let library = DeviceOptions { small_products: SmallProducts::Never, ..proposed };
    assert!(gradients(proposed) == gradients(library), "a way was heeded where nothing is to be measured");
}
