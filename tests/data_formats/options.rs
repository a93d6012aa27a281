//! Options that do not fit, whatever the format.

use super::*;

#[test]
fn options_that_do_not_fit_the_data_are_refused() -> TestResult {
    let digits = |change: &dyn Fn(&mut DataOptions)| {
        let mut options = DataOptions::new(FormatOptions::Digits);
        change(&mut options);
        options
    };
    refused(&digits(&|o| o.augment.time_mask = 3), &["data.augment.time_mask"]);
    refused(&digits(&|o| o.augment.crop = 9), &["data.augment.crop", "8 at most"]);
    refused(&digits(&|o| o.normalize = Some(Normalize::Given { mean: vec![0.0], std: vec![0.0] })), &["std above 0"]);
    refused(
        &digits(&|o| o.normalize = Some(Normalize::Given { mean: vec![0.0; 3], std: vec![1.0] })),
        &["3 values of mean"],
    );
    refused(&digits(&|o| o.split.test = Some(Part::Count(1797))), &["data.split.test", "fewer than the 1797"]);
    let both = |o: &mut DataOptions| o.split = split(Some(Part::Fraction(0.6)), Some(Part::Fraction(0.6)));
    refused(
        &digits(&both),
        &["data.split.validation", "found 1078 samples, expected fewer than the 719 that are left"],
    );
    refused(&digits(&|o| o.split.test = Some(Part::Pattern("x".into()))), &["data.split.test", "no files"]);
    refused(&digits(&|o| o.split.test = Some(Part::Every(0))), &["data.split.test"]);
    for (part, told) in [
        (Part::Fraction(0.0001), "found 0.0001, which holds out none of 1797 samples; give a larger share"),
        (Part::Count(0), "found 0, which holds out none of 1797 samples; expected 1 or more"),
        (Part::Every(5000), "found { every = 5000 }, which holds out none"),
    ] {
        refused(&digits(&|o| o.split.test = Some(part.clone())), &["data.split.test", told]);
    }
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("a.txt");
    std::fs::write(&path, "abcdefghij")?;
    let mut options = text_options(&path, TokenizerKind::Bytes, 3);
    options.augment = AugmentOptions { flip: true, ..Default::default() };
    refused(&options, &["data.augment"]);
    Ok(())
}

#[test]
fn a_batch_larger_than_the_split_is_refused_with_the_size_that_fits() -> TestResult {
    let inputs = vec![vec![1.0]; 3];
    let targets = InlineTargets::Real(inputs.clone());
    let mut options = DataOptions::new(FormatOptions::Inline(InlineOptions { inputs, targets }));
    let data = open(&options, None, 1)?;
    let error = data.train_batches(4, 1, 0).err().ok_or("no error")?;
    assert!(error.to_string().contains("set it to 3 at most"), "{error}");
    options.drop_last = Some(false);
    let batch = open(&options, None, 1)?.train_batches(4, 1, 0)?.next().ok_or("no batch")??;
    assert_eq!(batch.samples, 3);
    // A batch of one sample cannot be shared by two processes.
    let processes = Share::of_rank(1, 2);
    let wrong = warpstep::data::SamplerOptions {
        accumulate: 1,
        batch_size: 1,
        seed: 1,
        sampling: Sampling::Shuffle,
        drop_last: true,
        share: processes,
    };
    assert!(Loader::train(Arc::clone(&data.splits.train), wrong, 0, Prefetch::default()).is_err());
    Ok(())
}
