//! Sets of CPUs, as the kernel and Slurm write them.

use std::collections::BTreeSet;

use crate::rank::Environment;

/// CPUs beyond this number are in no set.
const CPUS_MAX: usize = 65_536;

/// A set of CPUs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct CpuMask {
    cpus: BTreeSet<usize>,
}

impl CpuMask {
    pub(super) fn count(&self) -> usize {
        self.cpus.len()
    }

    /// The kernel's lists: `0-3,8`.
    pub(super) fn from_list(list: &str) -> Option<Self> {
        let mut cpus = BTreeSet::new();
        for range in list.split(',') {
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
            if last >= CPUS_MAX {
                return None;
            }
            cpus.extend(first..=last);
        }
        Some(Self { cpus })
    }

    /// Slurm's masks: `0x0F`, the last digit for CPUs 0 to 3.
    pub(super) fn from_hex(text: &str) -> Option<Self> {
        let digits = text.strip_prefix("0x").unwrap_or(text);
        if digits.is_empty() || digits.len() > CPUS_MAX / 4 {
            return None;
        }
        let mut cpus = BTreeSet::new();
        for (place, digit) in digits.chars().rev().enumerate() {
            let bits = digit.to_digit(16)?;
            cpus.extend(
                (0..4)
                    .filter(|bit| bits >> bit & 1 == 1)
                    .map(|bit| place * 4 + bit),
            );
        }
        Some(Self { cpus })
    }
}

impl FromIterator<usize> for CpuMask {
    fn from_iter<I: IntoIterator<Item = usize>>(cpus: I) -> Self {
        Self {
            cpus: cpus.into_iter().collect(),
        }
    }
}

/// The masks that `srun --cpu-bind` gave to the tasks of this node, in their order. Empty when it did not, or when this
/// process's own mask is another than the variables say.
pub(super) fn of_step(environment: &Environment, own: &CpuMask, local_rank: usize) -> Vec<CpuMask> {
    let kind = environment.get("SLURM_CPU_BIND_TYPE").unwrap_or_default();
    if !kind.trim_end_matches(':').ends_with("mask_cpu") {
        return Vec::new();
    }
    let list = environment.get("SLURM_CPU_BIND_LIST").unwrap_or_default();
    let masks: Option<Vec<CpuMask>> = list.split(',').map(CpuMask::from_hex).collect();
    masks
        .filter(|masks| masks.get(local_rank) == Some(own))
        .unwrap_or_default()
}
