//! The whole system on a real kernel: the `tidegate` command, its server, ublk, file systems, failing devices.
//!
//! Runs in the test machine (`tests/vm/run -- target/release/deps/system-…`), because it loads modules, makes devices
//! and kills servers; elsewhere every test is reported as ignored, with the reason. Tests run one after the other.
//! Arguments: parts of names of tests to run. The command is `TIDEGATE_BIN`, or `tidegate` of the same build.

use std::io::Write;
use std::time::Instant;

#[path = "system/bytes.rs"]
mod bytes;
#[path = "system/crash.rs"]
mod crash;
#[path = "system/data.rs"]
mod data;
#[path = "system/devices.rs"]
mod devices;
#[path = "system/faults.rs"]
mod faults;
#[path = "system/identity.rs"]
mod identity;
#[path = "system/life.rs"]
mod life;
#[path = "system/limits.rs"]
mod limits;
#[path = "system/numbered.rs"]
mod numbered;
#[path = "system/power.rs"]
mod power;
#[path = "system/support.rs"]
mod support;

use support::{Skipped, clean_up, show_logs};

type Test = (&'static str, fn());

const TESTS: &[Test] = &[
    ("fio_verifies_mixed_sizes_with_ack_log", data::fio_verifies_mixed_sizes_with_ack_log),
    ("fio_verifies_mixed_sizes_with_ack_memory", data::fio_verifies_mixed_sizes_with_ack_memory),
    ("a_tree_survives_on_ext4", data::a_tree_survives_on_ext4),
    ("a_tree_survives_on_xfs", data::a_tree_survives_on_xfs),
    ("a_tree_survives_on_btrfs", data::a_tree_survives_on_btrfs),
    ("a_small_stage_before_a_slow_backing", data::a_small_stage_before_a_slow_backing),
    ("ten_killed_servers_under_a_file_system", life::ten_killed_servers_under_a_file_system),
    ("attach_and_detach_a_hundred_times", life::attach_and_detach_a_hundred_times),
    ("two_volumes_on_one_stage", life::two_volumes_on_one_stage),
    ("a_mounted_device_is_not_detached", life::a_mounted_device_is_not_detached),
    ("of_two_attaches_one_wins", life::of_two_attaches_one_wins),
    ("a_device_has_the_queues_that_were_asked_for", life::a_device_has_the_queues_that_were_asked_for),
    ("sigterm_hands_a_mounted_device_over", life::sigterm_hands_a_mounted_device_over),
    ("a_live_device_grows", life::a_live_device_grows),
    ("a_failing_backing_degrades_and_heals", faults::a_failing_backing_degrades_and_heals),
    (
        "a_backing_that_refuses_writes_degrades_and_heals",
        faults::a_backing_that_refuses_writes_degrades_and_heals,
    ),
    ("a_failing_log_stalls_writers", faults::a_failing_log_stalls_writers),
    ("a_failing_log_fails_writers_if_told_so", faults::a_failing_log_fails_writers_if_told_so),
    ("every_flush_is_a_good_place_to_die_ack_log", crash::every_flush_is_a_good_place_to_die_ack_log),
    ("every_flush_is_a_good_place_to_die_mixed_acks", crash::every_flush_is_a_good_place_to_die_mixed_acks),
    ("a_volatile_cache_loses_nothing_acknowledged", power::a_volatile_cache_loses_nothing_acknowledged),
    ("a_volatile_cache_keeps_what_was_synced", power::a_volatile_cache_keeps_what_was_synced),
    ("an_append_log_survives_power_cuts_ack_log", bytes::an_append_log_survives_power_cuts_ack_log),
    ("an_append_log_survives_power_cuts_ack_memory", bytes::an_append_log_survives_power_cuts_ack_memory),
    ("a_volume_is_a_block_device_or_a_byte_device", bytes::a_volume_is_a_block_device_or_a_byte_device),
    ("a_huge_sparse_volume", limits::a_huge_sparse_volume),
    ("idle_is_idle", limits::idle_is_idle),
    ("wrong_backings_are_refused", identity::wrong_backings_are_refused),
    ("an_old_stage_is_refused", identity::an_old_stage_is_refused),
    ("damage_in_the_log_is_found_and_refused", identity::damage_in_the_log_is_found_and_refused),
    ("superblock_copies_are_repaired", identity::superblock_copies_are_repaired),
];

fn main() {
    // Options of the usual test harness are accepted and have no meaning here.
    let wanted: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    if std::env::args().any(|a| a == "--list") {
        TESTS.iter().for_each(|(name, _)| println!("{name}: test"));
        return;
    }
    let tests: Vec<&Test> = TESTS
        .iter()
        .filter(|(name, _)| wanted.is_empty() || wanted.iter().any(|w| name.contains(w.as_str())))
        .collect();
    println!("\nrunning {} tests", tests.len());
    if let Err(why) = support::usable() {
        if std::env::var_os("TIDEGATE_TESTS_LATER").is_some() {
            println!(
                "\nlater, in the test machine: tests of the whole system\ntest result: ok. 0 passed; 0 failed; 0 ignored"
            );
            return;
        }
        for (name, _) in &tests {
            println!("test {name} ... ignored");
        }
        println!("\nSKIPPED: all {} tests of the whole system: {why}\n", tests.len());
        println!("test result: ok. 0 passed; 0 failed; {} ignored", tests.len());
        return;
    }
    let (mut passed, mut failed, mut ignored) = (0, Vec::new(), 0);
    let begun = Instant::now();
    for (name, test) in tests {
        print!("test {name} ... ");
        std::io::stdout().flush().unwrap();
        support::mark_kernel_log(name);
        let start = Instant::now();
        let outcome = std::panic::catch_unwind(test);
        let seconds = start.elapsed().as_secs_f32();
        match outcome {
            Ok(()) => {
                passed += 1;
                println!("ok ({seconds:.1} s)");
            }
            Err(panic) => match panic.downcast_ref::<Skipped>() {
                Some(Skipped(why)) => {
                    ignored += 1;
                    println!("ignored\nSKIPPED: {name}: {why}");
                }
                None => {
                    failed.push(*name);
                    println!("FAILED ({seconds:.1} s)");
                    show_logs();
                }
            },
        }
        clean_up();
    }
    let result = if failed.is_empty() { "ok" } else { "FAILED" };
    println!(
        "\ntest result: {result}. {passed} passed; {} failed; {ignored} ignored; {:.0} s",
        failed.len(),
        begun.elapsed().as_secs_f32()
    );
    if !failed.is_empty() {
        println!("failed: {}", failed.join(", "));
        std::process::exit(1);
    }
}
