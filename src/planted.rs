//! Bugs on purpose. At a few decision points the product asks `planted!` whether the test that runs on this thread wants
//! that decision to be wrong; the simulation must then notice. Outside of tests the question is the constant `false`.

/// Whether a `Bug` is wanted here, by its name. Always `false` outside of tests.
macro_rules! planted {
    ($bug:ident) => {{
        #[cfg(test)]
        let wanted = $crate::planted::is($crate::planted::Bug::$bug);
        #[cfg(not(test))]
        let wanted = false;
        wanted
    }};
}
#[cfg(test)]
pub(crate) use testing::*;

#[cfg(test)]
mod testing {
    use std::cell::Cell;

    /// A wrong decision.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub(crate) enum Bug {
        /// Who waits at the head is not woken when it moves.
        WakeForgotten,
        /// What was sent of a cut frame is forgotten, and that there is one.
        CutForgotten,
        /// A connection's own bytes go out in the middle of a cut frame.
        ControlBeforeCut,
        /// One frame that has left the log counts as still held.
        TailOffByOne,
        /// The ids of a stream of many channels say the heads instead of what the client has.
        HeadInIds,
        /// Who fills the hole of a member that left is not told its new index.
        IndexNotFixed,
        /// What a client has from a node that was ahead is sent again.
        FloorIgnored,
        /// A subscription ends and its group still lists it.
        ReleasedNotDetached,
        /// A served member leaves in the middle of a pass as if nobody had been served.
        BorderNotMoved,
        /// A subscription joins a group that stands elsewhere in the log.
        JoinsAnywhere,
        /// After a hand-over, what came without an offset is sent again.
        UnpositionedAgain,
        /// What was fetched is put in front of a log that it does not lead up to.
        OlderWithHole,
        /// Who has lapsed goes on among frames that were fetched for others.
        LapsedRevived,
        /// Messages held from a lost connection are delivered on the next one.
        HeldForever,
        /// A channel's history is read before its subscription is confirmed.
        ReadTooEarly,
        /// A message that does not follow is delivered as if it did.
        JumpTaken,
        /// A server that gave an offset out again is not recognised by what it published there.
        RewindUnnoticed,
        /// What a publication says of the one before it is not used to recognise that one.
        LinkIgnored,
        /// What the position's key says of the head is not used to recognise it.
        HeadIgnored,
        /// What a continued epoch has in common with what was delivered is delivered again.
        DeliveredAgain,
        /// A read that failed is not tried again.
        RetryForgotten,
        /// The log keeps what was before a gap.
        LogAcrossGap,
        /// A publication gets into the mailbox before the Live that still waits for room.
        LiveOvertaken,
        /// A publication gets into the mailbox before those that were missed.
        MissedOvertaken,
        /// A shard that let go of a channel is still sent what it missed of it.
        MissedKept,
        /// A channel that somebody came back to is let go of all the same.
        LingerNotEnded,
    }

    impl Bug {
        /// Those of a shard.
        pub(crate) const SHARD: [Bug; 13] = [
            Bug::WakeForgotten,
            Bug::CutForgotten,
            Bug::ControlBeforeCut,
            Bug::TailOffByOne,
            Bug::HeadInIds,
            Bug::IndexNotFixed,
            Bug::FloorIgnored,
            Bug::ReleasedNotDetached,
            Bug::BorderNotMoved,
            Bug::JoinsAnywhere,
            Bug::UnpositionedAgain,
            Bug::OlderWithHole,
            Bug::LapsedRevived,
        ];
        /// Those of the relay.
        pub(crate) const RELAY: [Bug; 13] = [
            Bug::HeldForever,
            Bug::ReadTooEarly,
            Bug::JumpTaken,
            Bug::RewindUnnoticed,
            Bug::LinkIgnored,
            Bug::HeadIgnored,
            Bug::DeliveredAgain,
            Bug::RetryForgotten,
            Bug::LogAcrossGap,
            Bug::LiveOvertaken,
            Bug::MissedOvertaken,
            Bug::MissedKept,
            Bug::LingerNotEnded,
        ];
    }

    thread_local! {
        static WANTED: Cell<Option<Bug>> = const { Cell::new(None) };
    }

    pub(crate) fn is(bug: Bug) -> bool {
        WANTED.get() == Some(bug)
    }

    /// Plants a bug on this thread, or none.
    pub(crate) fn plant(bug: Option<Bug>) {
        WANTED.set(bug);
    }
}
