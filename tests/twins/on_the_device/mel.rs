use std::sync::Arc;

use warpstep::log_mel::{LogMel, LogMelOptions, MelScale};

use super::*;

const RATE: u32 = 8000;

/// Waveforms of one length: noise, a pure tone, near silence, silence.
struct Waves {
    batch: usize,
    transform: Arc<LogMel>,
    /// Whether the tone's bands are compared as amplitudes, not as logarithms.
    amplitudes: bool,
}

impl Waves {
    fn new(batch: usize, samples: usize, [n_fft, hop, mels]: [usize; 3], scale: MelScale) -> Self {
        let options = LogMelOptions { n_fft: Some(n_fft), hop: Some(hop), mels, scale, ..LogMelOptions::default() };
        Waves { batch, transform: Arc::new(LogMel::new(&options, RATE, samples).unwrap()), amplitudes: false }
    }
}

impl Case for Waves {
    fn run<B: Backend>(&self, mut bed: Bed<B>, draw: &Draw) -> Vec<Vec<f64>> {
        let (batch, samples) = (self.batch, self.transform.samples());
        let noise = draw.normal(0, batch * samples);
        let wave = |i: usize| match i / samples % 4 {
            0 => noise[i] / 4.0,
            1 => (0.8 * (i % samples) as f64).sin(),
            2 => noise[i] / 4096.0,
            _ => 0.0,
        };
        let x: Vec<f64> = (0..batch * samples).map(|i| (draw.round)(wave(i))).collect();
        let [mels, frames] = self.transform.shape();
        let (x, y) = (bed.real(&x), bed.empty(batch * mels * frames));
        let transform = self.transform.clone();
        let pictures = LogMelForward { x, y, batch, transform, scale: 0.25, shift: 1.5 };
        let mut found = bed.run(&pictures).unwrap().get(y);
        if batch >= 4 {
            let silence = f64::from(1e-6f32.ln() * 0.25 + 1.5);
            let off = found[3 * mels * frames..].iter().take(mels * frames).map(|y| (y - silence).abs());
            assert!(off.fold(0.0, f64::max) < 0.01, "silence is {silence}");
        }
        if self.amplitudes && batch > 1 {
            let tone = &mut found[mels * frames..2 * mels * frames];
            tone.iter_mut().for_each(|y| *y = ((*y - 1.5) / 0.25 / 2.0).exp());
            let tone = tone.to_vec();
            found.drain(mels * frames..2 * mels * frames);
            return vec![found, tone];
        }
        vec![found]
    }
}

/// In f32 a transform errs by some 1e-7 of its largest value, whoever computes it. Bands that a tone leaves near silent are no
/// larger, so their logarithms differ by a thousandth; the amplitudes do not. In 16 bits the rounding of the result is more.
#[test]
fn waveforms_of_any_length_in_windows_of_any_even_size() {
    use MelScale::{Htk, Slaney};
    let cases = [
        // The spoken digits' sizes, and both scales.
        Waves::new(5, 1201, [256, 80, 40], Htk),
        Waves::new(4, 1000, [512, 80, 40], Slaney),
        // A window of all factors: 200 = 4 * 2 * 5 * 5, 240 = 4 * 4 * 3 * 5.
        Waves::new(4, 999, [400, 160, 23], Htk),
        Waves::new(4, 801, [480, 7, 8], Slaney),
        // Primes past 5: 7 * 11, and one that is the whole transform.
        Waves::new(4, 300, [154, 33, 9], Htk),
        Waves::new(1, 130, [202, 64, 5], Htk),
        // The smallest windows.
        Waves::new(4, 3, [4, 1, 1], Htk),
        Waves::new(3, 17, [6, 17, 1], Slaney),
        Waves::new(2, 9, [8, 4, 2], Htk),
        // One frame, one more than a block takes, and as many.
        Waves::new(1, 129, [256, 129, 40], Htk),
        Waves::new(1, 8 * 40, [128, 40, 10], Htk),
        Waves::new(2, 8 * 40 - 1, [128, 40, 10], Htk),
        // Fewer frames a block, down to one and more shared memory than a kernel has unasked.
        Waves::new(4, 1500, [1024, 500, 40], Htk),
        Waves::new(2, 2500, [2048, 1300, 40], Slaney),
        Waves::new(1, 4097, [8192, 4000, 64], Htk),
    ];
    compare::<bf16>("log-mel pictures", &cases, BF16);
    compare::<f16>("log-mel pictures", &cases, F16);
    compare::<f32>("log-mel pictures", &cases.map(|case| Waves { amplitudes: true, ..case }), F32);
}

#[test]
fn a_window_past_the_device_s_shared_memory_is_refused() {
    let Some(device) = device() else { return };
    let Waves { transform, .. } = Waves::new(1, 40_000, [1 << 16, 40_000, 40], MelScale::Htk);
    let [mels, frames] = transform.shape();
    let mut bed = Bed::new(Cuda::<f32>::new(device));
    let (x, y) = (bed.real(&vec![0.0; 40_000]), bed.empty(mels * frames));
    let refused = bed.run(&LogMelForward { x, y, batch: 1, transform, scale: 1.0, shift: 0.0 }).err().unwrap();
    assert!(refused.to_string().contains("data.mel.n_fft"), "{refused}");
}
