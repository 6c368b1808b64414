//! Every order of memory that the model allows: fences, and what is published with heads and tails.

super::model!(loom::sync, loom::thread);

/// Tries every execution in which threads are preempted that many times at most.
fn check(preemptions: usize, model: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(model);
}

fn never() -> bool {
    false
}

#[test]
fn what_is_submitted_wakes_a_server_that_sleeps() {
    check(5, || {
        let Both { layout, memory, mut session, bell, .. } = both(2, never);
        let client = thread::spawn({
            let bell = bell.clone();
            move || {
                let mut submitter = submitter();
                for _ in 0..2 {
                    let submission = write(&submitter);
                    submitter.put(&*memory, &layout, &submission);
                    if submitter.publish(&*memory) {
                        bell.ring();
                    }
                }
            }
        });
        serve(&mut session, &bell, (0, 2), || {});
        client.join().unwrap();
    });
}

/// The third request has no room for its completion before the first was taken. One thread submits, another takes.
#[test]
fn what_is_taken_wakes_a_server_without_room() {
    check(4, || {
        let Both { layout, memory, mut session, bell, .. } = both(1, never);
        let mut submitter = submitter();
        let mut submit = {
            let (memory, bell) = (memory.clone(), bell.clone());
            move || {
                let submission = write(&submitter);
                submitter.put(&*memory, &layout, &submission);
                if submitter.publish(&*memory) {
                    bell.ring();
                }
            }
        };
        for before in 0..2 {
            submit();
            serve(&mut session, &bell, (before, before + 1), || {});
        }
        let submitting = thread::spawn(submit);
        let taking = thread::spawn({
            let bell = bell.clone();
            move || {
                let taken = collect(&mut Reaper::default(), &memory, layout, &bell);
                let taken: Vec<(u64, u64)> = taken.iter().map(|c| (c.cookie, c.lsn)).collect();
                assert_eq!(taken[..2], [(1, 1), (2, 2)]);
            }
        });
        serve(&mut session, &bell, (2, 3), || {});
        submitting.join().unwrap();
        taking.join().unwrap();
    });
}

#[test]
fn what_is_completed_wakes_a_client_that_waits() {
    check(4, || {
        let Both { layout, memory, mut session, bell, line, waiting } = both(2, never);
        let client = thread::spawn({
            let bell = bell.clone();
            move || {
                let (mut submitter, mut reaper) = (submitter(), Reaper::default());
                for number in 1..=2 {
                    let submission = write(&submitter);
                    submitter.put(&*memory, &layout, &submission);
                    if submitter.publish(&*memory) {
                        bell.ring();
                    }
                    let done = || collect(&mut reaper, &memory, layout, &bell).pop();
                    let completion = waiting.until(&*memory, waiting.limit(None), done).unwrap().unwrap();
                    assert_eq!(completion.cookie, number);
                }
            }
        });
        serve(&mut session, &bell, (0, 2), || line.wake_client());
        client.join().unwrap();
    });
}

/// Two threads wait for different things: for the first request to be durable, and for the second.
#[test]
fn all_who_wait_are_woken() {
    check(3, || {
        let Both { layout, memory, mut session, bell, line, waiting } = both(2, never);
        let mut submitter = submitter();
        for _ in 0..2 {
            let submission = write(&submitter);
            submitter.put(&*memory, &layout, &submission);
        }
        submitter.publish(&*memory);
        let threads = [1, 2].map(|number| {
            let (memory, waiting) = (memory.clone(), waiting.clone());
            thread::spawn(move || {
                let done =
                    || (Word::load(memory.word(DURABLE_UP_TO), Ordering::Acquire) >= number).then_some(());
                waiting.until(&*memory, waiting.limit(None), done).unwrap().unwrap();
            })
        });
        serve(&mut session, &bell, (0, 2), || line.wake_client());
        threads.into_iter().for_each(|t| t.join().unwrap());
    });
}
