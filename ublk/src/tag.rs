//! State of one tag (request slot) of a queue.
//!
//! ```text
//!          fetch            request             commit
//!  Idle ──────────> Fetching ──────> Owned ───────────────> Committing
//!                      │               ^      request           │ │
//!                      │ abort         └────────────────────────┘ │ abort
//!                      └──────────> Aborted <─────────────────────┘
//! ```
//!
//! `Fetching` and `Committing` are with the kernel: exactly one completion comes. `Owned` is with the door: exactly one
//! commit comes. `Aborted` is final: the kernel has no further requests, and fetching again would never return.

/// Where the tag is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TagState {
    Idle,
    Fetching,
    Owned,
    Committing,
    Aborted,
}

/// What happens to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TagEvent {
    Fetch,
    Request,
    Commit,
    Abort,
}

impl TagState {
    /// The state after `event`, or `None` if the event is not legal now.
    pub fn after(self, event: TagEvent) -> Option<TagState> {
        use TagEvent::{Abort, Commit, Fetch, Request};
        use TagState::{Aborted, Committing, Fetching, Idle, Owned};
        match (self, event) {
            (Idle, Fetch) => Some(Fetching),
            (Fetching | Committing, Request) => Some(Owned),
            (Owned, Commit) => Some(Committing),
            (Fetching | Committing, Abort) => Some(Aborted),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_drawn_transitions_exist() {
        use TagEvent::{Abort, Commit, Fetch, Request};
        use TagState::{Aborted, Committing, Fetching, Idle, Owned};
        let drawn = [
            (Idle, Fetch, Fetching),
            (Fetching, Request, Owned),
            (Committing, Request, Owned),
            (Owned, Commit, Committing),
            (Fetching, Abort, Aborted),
            (Committing, Abort, Aborted),
        ];
        for state in [Idle, Fetching, Owned, Committing, Aborted] {
            for event in [Fetch, Request, Commit, Abort] {
                let expected = drawn.iter().find(|d| (d.0, d.1) == (state, event)).map(|d| d.2);
                assert_eq!(state.after(event), expected, "{state:?} {event:?}");
            }
        }
    }
}
