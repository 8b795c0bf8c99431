//! Each target over its seeds, over seeds that were changed at random, and over random bytes: what
//! was found once stays found, and a target that no longer works is seen without the fuzzer.

use std::fs;
use std::path::Path;

use fuzz::TARGETS;

/// Random inputs for each target.
const ROUNDS: u32 = 300;

/// Random numbers, the same each time (xorshift).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, most: usize) -> usize {
        usize::try_from(self.next() % most.max(1) as u64).unwrap_or(0)
    }

    fn change(&mut self, bytes: &mut [u8]) {
        for _ in 0..=self.below(8) {
            let at = self.below(bytes.len());
            if let Some(byte) = bytes.get_mut(at) {
                *byte = self.next().to_le_bytes()[0];
            }
        }
    }
}

#[test]
fn every_target_survives_its_seeds_and_random_bytes() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("seeds");
    let mut random = Random(0x5eed);
    for (name, run) in TARGETS {
        let mut seeds = Vec::new();
        if let Ok(entries) = fs::read_dir(folder.join(name)) {
            let mut paths: Vec<_> = entries.map(|entry| entry.expect("a seed").path()).collect();
            paths.sort();
            for path in paths {
                println!("{}", path.display());
                let seed = fs::read(&path).expect("a seed");
                run(&seed);
                seeds.push(seed);
            }
        }
        for round in 0..ROUNDS {
            let mut bytes = match seeds.get(random.below(seeds.len() * 2)) {
                Some(seed) => seed.clone(),
                None => (0..random.below(2000)).map(|_| random.next().to_le_bytes()[0]).collect(),
            };
            random.change(&mut bytes);
            println!("{name}: random input {round} of {} bytes", bytes.len());
            run(&bytes);
        }
    }
    fs::remove_dir_all(fuzz::folder()).expect("it is ours");
}
