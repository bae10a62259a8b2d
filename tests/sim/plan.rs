//! The names of what a seed may do: faults, points to die at, mechanisms to break; and what must be covered.

/// What can go wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    HubCrash,
    HubRestore,
    DaemonCrash,
    WardenCrash,
    PowerCut,
    SpoolReplaced,
    LinkCut,
    HalfOpen,
    Partition,
    SlowLink,
    SecondLink,
    Intruder,
    SlowStore,
    StoreError,
    StoreUnanswered,
    DuplicateDispatch,
    Cancel,
    Revoke,
    Drain,
    OwnerCloses,
    ClockJump,
    UngrantedOrder,
    UngrantedAttempt,
    NodeStop,
}

impl Fault {
    pub const ALL: [Fault; 24] = [
        Self::HubCrash,
        Self::HubRestore,
        Self::DaemonCrash,
        Self::WardenCrash,
        Self::PowerCut,
        Self::SpoolReplaced,
        Self::LinkCut,
        Self::HalfOpen,
        Self::Partition,
        Self::SlowLink,
        Self::SecondLink,
        Self::Intruder,
        Self::SlowStore,
        Self::StoreError,
        Self::StoreUnanswered,
        Self::DuplicateDispatch,
        Self::Cancel,
        Self::Revoke,
        Self::Drain,
        Self::OwnerCloses,
        Self::ClockJump,
        Self::UngrantedOrder,
        Self::UngrantedAttempt,
        Self::NodeStop,
    ];
}

/// The hub's writes; it may die before one is committed, and after that before anybody hears of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Write {
    Accept,
    Assigned,
    Started,
    Ended,
    CancelRequested,
    Output,
    Hello,
    Revoke,
}

/// Where a process may die.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Point {
    HubBefore(Write),
    HubAfter(Write),
    /// The order is on its way, the acknowledgement of a result too.
    HubOrderSent,
    HubResultAckSent,
    DaemonOrderReceived,
    DaemonStartedTold,
    DaemonResultTold,
    DaemonAckReceived,
    WardenBeforeStarting,
    WardenAfterStarting,
    WardenAfterExec,
    WardenDuringOutput,
    WardenBeforeExit,
    WardenAfterExit,
    WardenBeforeRefused,
    WardenBeforeForget,
    /// The whole machine loses its power; what was not synced is gone.
    PowerAfterStarting,
    PowerDuringOutput,
    PowerBeforeExit,
    PowerAfterExit,
}

impl Point {
    pub const ALL: [Point; 34] = [
        Self::HubBefore(Write::Accept),
        Self::HubBefore(Write::Assigned),
        Self::HubBefore(Write::Started),
        Self::HubBefore(Write::Ended),
        Self::HubBefore(Write::CancelRequested),
        Self::HubBefore(Write::Output),
        Self::HubBefore(Write::Hello),
        Self::HubBefore(Write::Revoke),
        Self::HubAfter(Write::Accept),
        Self::HubAfter(Write::Assigned),
        Self::HubAfter(Write::Started),
        Self::HubAfter(Write::Ended),
        Self::HubAfter(Write::CancelRequested),
        Self::HubAfter(Write::Output),
        Self::HubAfter(Write::Hello),
        Self::HubAfter(Write::Revoke),
        Self::HubOrderSent,
        Self::HubResultAckSent,
        Self::DaemonOrderReceived,
        Self::DaemonStartedTold,
        Self::DaemonResultTold,
        Self::DaemonAckReceived,
        Self::WardenBeforeStarting,
        Self::WardenAfterStarting,
        Self::WardenAfterExec,
        Self::WardenDuringOutput,
        Self::WardenBeforeExit,
        Self::WardenAfterExit,
        Self::WardenBeforeRefused,
        Self::WardenBeforeForget,
        Self::PowerAfterStarting,
        Self::PowerDuringOutput,
        Self::PowerBeforeExit,
        Self::PowerAfterExit,
    ];
}

/// A mechanism to be left out, to see that somebody notices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Break {
    /// The node starts what is not granted.
    SkipGrant,
    /// The order leaves before its attempt is committed.
    OrderBeforeCommit,
    /// The words of an older link count as those of the present one.
    SkipFence,
    AcceptBeforeCommit,
    AckOutputBeforeCommit,
    AckResultBeforeCommit,
    /// A restored hub begins its numbers as it did before.
    ForgetIncarnation,
    /// The hello tells the spool's first id for ever.
    ForgetSpool,
    /// Daemon and warden start what they know.
    StartKnownAgain,
    /// The warden starts without having written that it does.
    ForgetStarting,
    /// What is silent for ten seconds runs elsewhere.
    RequeueOnClock,
    /// A hello brings no order again.
    DropResend,
    /// A hello is a welcome and nothing else.
    SkipReconcile,
    /// The result does not wait for its output, on either side.
    ResultBeforeOutput,
    /// The end of an attempt leaves its slot taken.
    LoseRelease,
}

impl Break {
    /// With the invariants of which one must notice.
    pub const ALL: [(Break, &'static [&'static str]); 15] = [
        (Self::SkipGrant, &["grant_before_start"]),
        (Self::OrderBeforeCommit, &["grant_before_start"]),
        (Self::SkipFence, &["superseded_changes_nothing"]),
        (Self::AcceptBeforeCommit, &["nothing_lost"]),
        (Self::AckOutputBeforeCommit, &["acknowledged_is_durable"]),
        (Self::AckResultBeforeCommit, &["acknowledged_is_durable"]),
        (Self::ForgetIncarnation, &["never_twice"]),
        (Self::ForgetSpool, &["grant_before_start"]),
        (Self::StartKnownAgain, &["never_twice"]),
        (Self::ForgetStarting, &["never_twice"]),
        (Self::RequeueOnClock, &["never_twice"]),
        (Self::DropResend, &["comes_to_rest"]),
        (Self::SkipReconcile, &["comes_to_rest"]),
        (Self::ResultBeforeOutput, &["output_before_result"]),
        (Self::LoseRelease, &["slots_given_back", "comes_to_rest"]),
    ];
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().map(|(b, _)| b).find(|b| format!("{b:?}") == name)
    }
}

/// Every transition of `mesh_core::task::step` that this hub can bring about. Nothing grants an attempt
/// after its assignment yet, so those that need it are not here; they come with it. What an
/// older attempt says is stopped before the journal, so only two kinds of refusal are common.
pub const TRANSITIONS: &[&str] = &[
    "pending assigned assigned",
    "pending cancel_requested cancelled",
    "pending deadline_passed failed",
    "pending expired failed",
    "assigned withdrawn pending",
    "assigned started running",
    "assigned ended pending",
    "assigned ended failed",
    "assigned ended cancelled",
    "assigned ended succeeded",
    "assigned node_revoked failed",
    "assigned node_revoked pending",
    "assigned node_revoked cancelled",
    "assigned node_silent failed",
    "assigned node_silent pending",
    "assigned node_silent cancelled",
    "running node_silent failed",
    "running node_silent pending",
    "running node_silent cancelled",
    "assigned cancel_requested assigned",
    "assigned deadline_passed assigned",
    "running ended pending",
    "running ended succeeded",
    "running ended failed",
    "running ended cancelled",
    "running node_revoked failed",
    "running node_revoked pending",
    "running node_revoked cancelled",
    "running cancel_requested running",
    "running deadline_passed running",
    "refused final",
    "refused repeated",
];
