//! Deliberate bugs, each at one place of the engine, to measure what the tests find. Only with the feature `mutations`
//! can one be switched on; without it [`is`] is constantly false and nothing of them is in the program.

/// A deliberate bug.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(missing_docs, reason = "the table in docs/testing.md says what each does")]
pub enum Mutation {
    // acknowledgement and commit
    CommitBeforePublish,
    FailedGroupCountsAsWritten,
    GroupsBecomeDurableInAnyOrder,
    RegionBeginsTooEarly,
    GroupsClaimTooMuchProof,
    LogWriteIsNotDurable,
    AckBeforeDurable,
    FuaIsIgnored,
    FlushIsIgnored,
    AckIsLost,
    SpaceWaitersAreForgotten,
    UnfetchedWriteCounts,
    // index and reads
    OlderRecordWins,
    CutForgetsTheTail,
    FlushForgetsNewerRecords,
    DiscardReadsTheBacking,
    ReadIgnoresTheStage,
    ReadsRunAhead,
    // regions
    ReclaimAboveTheCheckpoint,
    ReclaimWhilePinned,
    ReclaimBeforeTheDurableHead,
    TableBeforeDurable,
    StageOverfills,
    // flush
    EpochSyncIsSkipped,
    FailedSyncCountsAsSync,
    CheckpointBeforeSync,
    CheckpointTooHigh,
    CheckpointIsNotDurable,
    FailedCheckpointRepeatsTheEpoch,
    CheckpointHeadTooHigh,
    EpochTakesUndurable,
    PatchLogIsSkipped,
    PatchLogIsNotDurable,
    PatchZoneReusedBeforeSync,
    HalfWrittenPatchesAreForgotten,
    LabelsShareOneSlot,
    LabelIsNotWritten,
    ZeroesAreDropped,
    // recovery
    LastGroupIsDropped,
    ArenaRecordsAreDropped,
    ArenaLossIsNotTold,
    ArenaIsTrusted,
    PayloadIsNotChecked,
    GivenUpGroupsComeBack,
    RecoveryDoesNotSync,
    CachedLabelIsTrusted,
    PatchesAreNotRestored,
    SuperblockCopiesAtOnce,
    DamageTakenForTheEnd,
    CloseIsNotChecked,
    OldBackingIsAccepted,
    OldStageIsAccepted,
    WrongBackingIsAccepted,
    // status and pace
    BackingErrorIsHidden,
    FlushHidesUnreadableRegions,
    ErrorStaysInStatus,
    RetriesDoNotPause,
    // sessions of the byte door
    TicketsAreNotWaitedFor,
    ReadsOvertakeChanges,
    BarrierDoesNotWait,
    PayloadGivenBackEarly,
    AcceptedBeforePublished,
    DurableWordTooHigh,
    SilentFailureIsForgotten,
    ClientIsNotRung,
    WaitingSessionsAreNotWoken,
    GoneClientsWorkIsDropped,
    GoneClientIsHeard,
    EndedSessionsTicketsAreReady,
    ReadsOvertakeTickets,
    AcceptedIsNotTold,
    SessionEndsDuringALogWrite,
}

/// All of them.
#[cfg(feature = "mutations")]
pub const ALL: &[Mutation] = &[
    Mutation::CommitBeforePublish,
    Mutation::FailedGroupCountsAsWritten,
    Mutation::GroupsBecomeDurableInAnyOrder,
    Mutation::RegionBeginsTooEarly,
    Mutation::GroupsClaimTooMuchProof,
    Mutation::LogWriteIsNotDurable,
    Mutation::AckBeforeDurable,
    Mutation::FuaIsIgnored,
    Mutation::FlushIsIgnored,
    Mutation::AckIsLost,
    Mutation::SpaceWaitersAreForgotten,
    Mutation::UnfetchedWriteCounts,
    Mutation::OlderRecordWins,
    Mutation::CutForgetsTheTail,
    Mutation::FlushForgetsNewerRecords,
    Mutation::DiscardReadsTheBacking,
    Mutation::ReadIgnoresTheStage,
    Mutation::ReadsRunAhead,
    Mutation::ReclaimAboveTheCheckpoint,
    Mutation::ReclaimWhilePinned,
    Mutation::ReclaimBeforeTheDurableHead,
    Mutation::TableBeforeDurable,
    Mutation::StageOverfills,
    Mutation::EpochSyncIsSkipped,
    Mutation::FailedSyncCountsAsSync,
    Mutation::CheckpointBeforeSync,
    Mutation::CheckpointTooHigh,
    Mutation::CheckpointIsNotDurable,
    Mutation::FailedCheckpointRepeatsTheEpoch,
    Mutation::CheckpointHeadTooHigh,
    Mutation::EpochTakesUndurable,
    Mutation::PatchLogIsSkipped,
    Mutation::PatchLogIsNotDurable,
    Mutation::PatchZoneReusedBeforeSync,
    Mutation::HalfWrittenPatchesAreForgotten,
    Mutation::LabelsShareOneSlot,
    Mutation::LabelIsNotWritten,
    Mutation::ZeroesAreDropped,
    Mutation::LastGroupIsDropped,
    Mutation::ArenaRecordsAreDropped,
    Mutation::ArenaLossIsNotTold,
    Mutation::ArenaIsTrusted,
    Mutation::PayloadIsNotChecked,
    Mutation::GivenUpGroupsComeBack,
    Mutation::RecoveryDoesNotSync,
    Mutation::CachedLabelIsTrusted,
    Mutation::PatchesAreNotRestored,
    Mutation::SuperblockCopiesAtOnce,
    Mutation::DamageTakenForTheEnd,
    Mutation::CloseIsNotChecked,
    Mutation::OldBackingIsAccepted,
    Mutation::OldStageIsAccepted,
    Mutation::WrongBackingIsAccepted,
    Mutation::BackingErrorIsHidden,
    Mutation::FlushHidesUnreadableRegions,
    Mutation::ErrorStaysInStatus,
    Mutation::RetriesDoNotPause,
    Mutation::TicketsAreNotWaitedFor,
    Mutation::ReadsOvertakeChanges,
    Mutation::BarrierDoesNotWait,
    Mutation::PayloadGivenBackEarly,
    Mutation::AcceptedBeforePublished,
    Mutation::DurableWordTooHigh,
    Mutation::SilentFailureIsForgotten,
    Mutation::ClientIsNotRung,
    Mutation::WaitingSessionsAreNotWoken,
    Mutation::GoneClientsWorkIsDropped,
    Mutation::GoneClientIsHeard,
    Mutation::EndedSessionsTicketsAreReady,
    Mutation::ReadsOvertakeTickets,
    Mutation::AcceptedIsNotTold,
    Mutation::SessionEndsDuringALogWrite,
];

/// Whether the bug is switched on in this thread.
#[cfg(not(feature = "mutations"))]
#[must_use]
#[inline(always)]
pub const fn is(_: Mutation) -> bool {
    false
}

/// `run`, to be called by another thread with the bug that is switched on in this one.
#[cfg(not(feature = "mutations"))]
pub fn carried<T>(run: impl FnOnce() -> T) -> impl FnOnce() -> T {
    run
}

#[cfg(feature = "mutations")]
pub use switch::{carried, is, set};

#[cfg(feature = "mutations")]
mod switch {
    use std::cell::Cell;

    use super::Mutation;

    thread_local! {
        static ON: Cell<Option<Mutation>> = const { Cell::new(None) };
    }

    /// Whether the bug is switched on in this thread.
    #[must_use]
    pub fn is(mutation: Mutation) -> bool {
        ON.get() == Some(mutation)
    }

    /// `run`, to be called by another thread with the bug that is switched on in this one.
    pub fn carried<T>(run: impl FnOnce() -> T) -> impl FnOnce() -> T {
        let on = ON.get();
        move || {
            set(on);
            run()
        }
    }

    /// Switches one bug on in this thread, and every other one off.
    pub fn set(mutation: Option<Mutation>) {
        ON.set(mutation);
    }
}
