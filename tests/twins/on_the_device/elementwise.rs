use super::*;

/// The sum of two, parts side by side and taken apart again, the mean over time with and without padding.
struct Joined([usize; 3]);

impl Case for Joined {
    fn run<B: Backend>(&self, mut bed: Bed<B>, draw: &Draw) -> Vec<Vec<f64>> {
        let [batch, time, width] = self.0;
        let (rows, len) = (batch * time, batch * time * width);
        let (x, z, y) = (bed.real(&draw.normal(0, len)), bed.real(&draw.normal(1, len)), bed.empty(len));
        let mut found = vec![bed.run(&Add { a: x, b: z, y, len }).unwrap().get(y)];
        let widths = vec![width, 3, width];
        let parts = vec![x, bed.real(&draw.normal(2, rows * 3)), z];
        let total = 2 * width + 3;
        let whole_row = bed.empty(rows * total);
        let op = Concatenate { parts, widths: widths.clone(), y: whole_row, rows };
        found.push(bed.run(&op).unwrap().get(whole_row));
        let joined = bed.real(&draw.normal(4, rows * total));
        let parts: Vec<_> = widths.iter().map(|width| bed.empty(rows * width)).collect();
        let apart = bed.run(&Split { x: joined, parts: parts.clone(), widths, rows }).unwrap();
        found.extend(parts.into_iter().map(|part| apart.get(part)));
        // The first sample may be nothing but padding.
        let mut tokens = whole(draw.seed, 9, rows, 3);
        tokens[..time].fill(0);
        let tokens = bed.whole(&tokens);
        for padding in [None, Some(Padding { tokens, pad: 0 })] {
            let (mean, dy) = (bed.empty(batch * width), bed.real(&draw.normal(3, batch * width)));
            let dx = bed.empty(len);
            found.push(bed.run(&MeanTimeForward { x, y: mean, batch, time, width, padding }).unwrap().get(mean));
            found.push(bed.run(&MeanTimeBackward { dy, dx, batch, time, width, padding }).unwrap().get(dx));
        }
        found
    }
}

#[test]
fn sums_joins_and_means() {
    let sizes = [[1, 1, 1], [2, 3, 7], [3, 5, 8], [2, 17, 129], [1, 2, 257], [1, 2, 1000]];
    in_all_types("elementwise", &sizes.map(Joined));
}
