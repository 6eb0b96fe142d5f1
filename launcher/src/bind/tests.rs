//! Devices and threads of recorded nodes.

use super::*;

fn node(local_rank: usize, local_size: usize) -> Node {
    Node {
        local_rank,
        local_size,
        devices: Vec::new(),
        devices_are_own: false,
        cpus: (0..8).collect(),
        neighbours: Vec::new(),
        node_cpus: 8,
        cpu_quota: None,
    }
}

fn device_of(local_rank: usize, local_size: usize, list: &str, own: bool) -> Option<String> {
    let node = Node {
        devices: visible_devices(list),
        devices_are_own: own,
        ..node(local_rank, local_size)
    };
    let environment = decide(&node).environment;
    environment.into_iter().next().map(|(name, value)| {
        assert_eq!(name, DEVICES);
        value
    })
}

#[test]
fn each_rank_gets_its_device() {
    assert_eq!(device_of(0, 4, "0,1,2,3", false).as_deref(), Some("0"));
    assert_eq!(device_of(3, 4, "0,1,2,3", false).as_deref(), Some("3"));
    // The list of the user, in its order.
    assert_eq!(device_of(1, 2, "6,4", false).as_deref(), Some("4"));
    assert_eq!(
        device_of(1, 2, "GPU-8932f937,GPU-d72c5b65", false).as_deref(),
        Some("GPU-d72c5b65")
    );
    assert_eq!(
        device_of(1, 2, "MIG-GPU-a/1/0, MIG-GPU-a/2/0", false).as_deref(),
        Some("MIG-GPU-a/2/0")
    );
    // Fewer devices than ranks: in turn.
    assert_eq!(device_of(3, 4, "0,1", false).as_deref(), Some("1"));
}

#[test]
fn what_is_limited_already_stays() {
    // srun --gpus-per-task=1: each task sees one.
    assert_eq!(device_of(1, 4, "0", false), None);
    assert_eq!(device_of(1, 4, "2", true), None);
    // srun --gpus-per-task=2: the list is the task's own.
    assert_eq!(device_of(1, 2, "2,3", true).as_deref(), Some("2"));
    // A rank alone on its node takes the first by itself.
    assert_eq!(device_of(0, 1, "0,1,2,3", false), None);
}

#[test]
fn more_ranks_than_devices_are_refused() {
    let seen = |list: &str| Environment::from_pairs([(DEVICES, list)]);
    assert_eq!(check_devices(&seen("0,1"), 2), Ok(()));
    let refused = check_devices(&seen("0,1"), 4).unwrap_err();
    assert_eq!((refused.ranks, refused.devices), (4, 2));
    assert!(refused.to_string().contains("each of 4 ranks"), "{refused}");
    // Nothing is known of a machine without devices.
    assert_eq!(check_devices(&seen(""), 4), Ok(()));
}

#[test]
fn no_device_is_none() {
    for list in ["", "-1", "NoDevFiles", "void"] {
        assert_eq!(device_of(0, 2, list, false), None, "{list}");
    }
    // CUDA stops reading at the first that is none.
    assert_eq!(visible_devices("0,1,-1,2"), ["0", "1"]);
    let none = Environment::from_pairs([(DEVICES, "")]);
    assert!(devices_of_machine(&none).is_empty());
}

#[expect(clippy::needless_pass_by_value, reason = "each case makes its own")]
fn threads(node: Node) -> u32 {
    decide(&node).threads
}

#[test]
fn one_mask_is_shared() {
    // mpirun --bind-to none, srun with task/none: all on all CPUs.
    assert_eq!(threads(node(0, 1)), 8);
    assert_eq!(threads(node(1, 2)), 4);
    assert_eq!(threads(node(1, 3)), 2);
    assert_eq!(threads(node(0, 16)), 1);
}

#[test]
fn own_masks_are_not() {
    // srun --cpus-per-task=2 with affinity: two CPUs each of eight.
    let bound = Node {
        cpus: [2, 3].into_iter().collect(),
        ..node(1, 4)
    };
    assert_eq!(threads(bound), 2);
    // mpirun --bind-to numa: four ranks on two halves.
    let half = Node {
        cpus: (4..8).collect(),
        ..node(3, 4)
    };
    assert_eq!(threads(half), 2);
}

#[test]
fn masks_of_the_step_are_exact() {
    let environment = Environment::from_pairs([
        ("SLURM_CPU_BIND_TYPE", "mask_cpu:"),
        ("SLURM_CPU_BIND_LIST", "0x0F,0x0F,0x70,0x80"),
    ]);
    let share = |local_rank, cpus: CpuMask| {
        threads(Node {
            neighbours: mask::of_step(&environment, &cpus, local_rank),
            cpus,
            ..node(local_rank, 4)
        })
    };
    assert_eq!(share(0, (0..4).collect()), 2);
    assert_eq!(share(2, (4..7).collect()), 3);
    assert_eq!(share(3, [7].into_iter().collect()), 1);
    // Bound anew since (numactl, a container): the list says nothing of that.
    let other: CpuMask = (0..8).collect();
    assert!(mask::of_step(&environment, &other, 0).is_empty());
}

#[test]
fn a_quota_is_shared_by_all() {
    let limited = Node {
        cpu_quota: Some(2),
        ..node(0, 2)
    };
    assert_eq!(threads(limited), 1);
}

#[test]
fn masks_as_they_are_written() {
    let set = |cpus: &[usize]| cpus.iter().copied().collect::<CpuMask>();
    assert_eq!(CpuMask::from_list("0-3,8"), Some(set(&[0, 1, 2, 3, 8])));
    assert_eq!(CpuMask::from_list("0-"), None);
    assert_eq!(CpuMask::from_list("0-99999999999"), None);
    assert_eq!(
        CpuMask::from_hex("0x00000000000000000000000000A1"),
        Some(set(&[0, 5, 7]))
    );
    assert_eq!(CpuMask::from_hex("0x1g"), None);
    assert_eq!(CpuMask::from_hex("0x"), None);
}

#[test]
fn this_machine_has_a_share_for_everyone() {
    let own = Environment::of_process();
    let all = of_this_process(&own, 0, 1).threads;
    let half = of_this_process(&own, 1, 2).threads;
    assert!(all >= 1 && half >= 1 && half <= all, "{all} {half}");
}
