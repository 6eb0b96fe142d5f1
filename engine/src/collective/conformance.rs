//! The contract of [`Collective`], written once, from the view of one rank: every rank of a group runs the same check.
//!
//! Each rank knows what all the others contribute, so it compares with the serial sum by itself, bit for bit.

use std::ops::Range;

use super::Collective;

/// A check, run by all ranks at once.
pub(super) type Check = fn(&mut dyn Collective);

/// All of them, by name.
pub(super) const CHECKS: &[(&str, Check)] = &[
    ("sums are serial sums", sums_are_serial_sums),
    ("parts sum for themselves", parts_sum_for_themselves),
    ("a value's sum is its own", a_values_sum_is_its_own),
    ("messages cross", messages_cross),
    ("messages keep their order", messages_keep_their_order),
    ("all hear the leader", all_hear_the_leader),
    ("kinds mix", kinds_mix),
];

/// Lengths around everything that is treated differently.
const LENGTHS: [usize; 9] = [0, 1, 2, 3, 31, 4_096, 16_383, 16_384, 100_003];

/// What a rank contributes: spread over many magnitudes, so that the order of a sum shows in its bits.
fn value(rank: usize, index: usize, salt: usize) -> f32 {
    let mixed = (rank * 7_919 + index * 104_729 + salt * 1_299_709 + 17) % 65_521;
    let mantissa = f32::from(u16::try_from(mixed).expect("a remainder of 65,521")) - 32_000.5;
    let exponent = i32::try_from((rank + index * 3 + salt) % 13).expect("small") - 6;
    mantissa * 10_f32.powi(exponent)
}

fn values(rank: usize, length: usize, salt: usize) -> Vec<f32> {
    (0..length).map(|index| value(rank, index, salt)).collect()
}

fn serial_sum(members: Range<usize>, length: usize, salt: usize) -> Vec<f32> {
    let mut sum = values(members.start, length, salt);
    for rank in members.skip(1) {
        for (sum, value) in sum.iter_mut().zip(values(rank, length, salt)) {
            *sum += value;
        }
    }
    sum
}

fn check_sum(group: &mut dyn Collective, members: &Range<usize>, length: usize, salt: usize) {
    let mut mine = values(group.rank(), length, salt);
    group.all_reduce_sum(members.clone(), &mut mine).unwrap();
    let serial = serial_sum(members.clone(), length, salt);
    let same = mine
        .iter()
        .zip(&serial)
        .all(|(a, b)| a.to_bits() == b.to_bits());
    let rank = group.rank();
    assert!(
        same,
        "rank {rank} over {members:?}, {length} values: the bits differ from the serial sum's"
    );
}

fn sums_are_serial_sums(group: &mut dyn Collective) {
    let all = 0..group.size();
    for (salt, length) in LENGTHS.into_iter().enumerate() {
        check_sum(group, &all, length, salt);
    }
    check_sum(group, &all, 5_000_011, 99);
}

fn parts_sum_for_themselves(group: &mut dyn Collective) {
    let (rank, size) = (group.rank(), group.size());
    for part in [1, 2, 4] {
        let start = rank / part * part;
        let members = start..(start + part).min(size);
        for (salt, length) in LENGTHS.into_iter().enumerate() {
            check_sum(group, &members, length, salt);
        }
    }
}

/// A row's sum must not depend on the rows beside it.
fn a_values_sum_is_its_own(group: &mut dyn Collective) {
    let (rank, all) = (group.rank(), 0..group.size());
    let mut long = values(rank, 50_000, 5);
    let mut short = long[20_000..20_100].to_vec();
    group.all_reduce_sum(all.clone(), &mut long).unwrap();
    group.all_reduce_sum(all, &mut short).unwrap();
    let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&long[20_000..20_100]), bits(&short));
}

fn message(from: usize, to: usize, length: usize) -> Vec<u8> {
    (0..length)
        .map(|index| u8::try_from((from * 31 + to * 7 + index) % 251).expect("a small remainder"))
        .collect()
}

/// Everyone sends to everyone before anyone receives.
fn messages_cross(group: &mut dyn Collective) {
    let (rank, size) = (group.rank(), group.size());
    let mut came = b"what was there before".to_vec();
    for length in [0, 1, 4_097, 3_000_001] {
        for to in (0..size).filter(|to| *to != rank) {
            group.send(to, &message(rank, to, length)).unwrap();
        }
        for from in (0..size).rev().filter(|from| *from != rank) {
            group.receive(from, &mut came).unwrap();
            assert_eq!(came, message(from, rank, length), "from {from} to {rank}");
        }
    }
}

/// Many short messages in a row, which nobody waits for in between.
fn messages_keep_their_order(group: &mut dyn Collective) {
    let (rank, size) = (group.rank(), group.size());
    let (next, before) = ((rank + 1) % size, (rank + size - 1) % size);
    for number in 0..500_u32 {
        group.send(next, &number.to_le_bytes()).unwrap();
    }
    let mut came = Vec::new();
    for number in 0..500_u32 {
        group.receive(before, &mut came).unwrap();
        assert_eq!(came, number.to_le_bytes());
    }
}

fn all_hear_the_leader(group: &mut dyn Collective) {
    for length in [0, 1, 777, 2_000_000] {
        let mut said = match group.rank() {
            0 => message(0, 9, length),
            _ => b"to be replaced".to_vec(),
        };
        group.broadcast(&mut said).unwrap();
        assert_eq!(said, message(0, 9, length));
    }
    // The leader may be far ahead of those who listen.
    for number in 0..200_u32 {
        let mut said = number.to_le_bytes().to_vec();
        group.broadcast(&mut said).unwrap();
        assert_eq!(said, number.to_le_bytes());
    }
}

/// A pipeline's pattern: the plan to all, sums within a stage, rows to the next stage, an answer to the leader.
fn kinds_mix(group: &mut dyn Collective) {
    let (rank, size) = (group.rank(), group.size());
    let stage = if size.is_multiple_of(2) { size / 2 } else { 1 };
    let start = rank / stage * stage;
    let mut came = Vec::new();
    for step in 0..20 {
        let mut plan = message(0, 3, step * 11);
        if rank != 0 {
            plan.clear();
        }
        group.broadcast(&mut plan).unwrap();
        assert_eq!(plan.len(), step * 11);
        if rank >= stage {
            group.receive(rank - stage, &mut came).unwrap();
            assert_eq!(came, message(rank - stage, rank, 70_000));
        }
        check_sum(group, &(start..start + stage), 2_000 * (step + 1), step);
        if rank + stage < size {
            let rows = message(rank, rank + stage, 70_000);
            group.send(rank + stage, &rows).unwrap();
        }
        if rank == size - 1 {
            group.send(0, &message(rank, 0, 999)).unwrap();
        }
        if rank == 0 {
            group.receive(size - 1, &mut came).unwrap();
            assert_eq!(came, message(size - 1, 0, 999));
        }
    }
}
