"""The state machine against a second, independently written copy of the table, and its laws."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from culm.errors import Conflict
from culm.states import (
    FINAL,
    LEASED,
    PILOT_EVENTS,
    TRANSITIONS,
    UNREADY,
    Event,
    State,
    next_state,
)
from shard.lifecycle import DATA_EVENTS

EXPECTED = """
submit          -                                                       defined
submit_ready    -                                                       activated
inputs_missing  defined                                                 waiting
assign          defined waiting                                         assigned
inputs_ready    defined waiting assigned                                activated
claim           activated                                               sent
hold_back       activated                                               pending
let_go          pending                                                 activated
release         sent starting running                                   activated
expire          sent starting running                                   activated
lose            sent starting running holding transferring merging      failed
start           sent                                                    starting
run             sent starting                                           running
hold            sent starting running                                   holding
transfer        sent starting running                                   transferring
move_outputs    holding                                                 transferring
merge           holding transferring                                    merging
finish          sent starting running holding transferring merging      finished
fail            defined waiting assigned                                failed
fail            sent starting running holding transferring merging      failed
cancel          defined waiting assigned pending activated              cancelled
cancel          sent starting running holding transferring merging      cancelled
close           defined waiting assigned pending activated              closed
close           sent starting running holding transferring merging      closed
"""


def _expected() -> dict[tuple[State | None, Event], State]:
    table: dict[tuple[State | None, Event], State] = {}
    for line in EXPECTED.strip().splitlines():
        event, *froms, to = line.split()
        for source in froms:
            table[None if source == "-" else State(source), Event(event)] = State(to)
    return table


ALL_PAIRS = [(state, event) for state in [None, *State] for event in Event]
KNOWN = _expected()


def test_the_table_is_this_and_nothing_else() -> None:
    assert TRANSITIONS == KNOWN


@pytest.mark.parametrize(("state", "event"), list(KNOWN))
def test_each_transition(state: State | None, event: Event) -> None:
    assert next_state(state, event) is KNOWN[state, event]


@pytest.mark.parametrize(("state", "event"), [pair for pair in ALL_PAIRS if pair not in KNOWN])
def test_each_pair_that_is_not_declared_is_a_conflict(state: State | None, event: Event) -> None:
    with pytest.raises(Conflict) as caught:
        next_state(state, event)
    assert caught.value.code == "bad_transition"
    assert caught.value.http_status == 409


def test_the_states_are_pandas() -> None:
    """The fourteen of 2009, and `pending`, which came later: accepted, and held back."""
    unready, ready = {"defined", "waiting", "assigned", "pending"}, {"activated"}
    leased = {"sent", "starting", "running", "holding", "transferring", "merging"}
    final = {"finished", "failed", "cancelled", "closed"}
    assert {str(state) for state in State} == unready | ready | leased | final


def test_every_state_is_of_exactly_one_kind() -> None:
    kinds = [UNREADY, {State.PENDING}, {State.ACTIVATED}, LEASED, FINAL]
    for state in State:
        assert sum(state in kind for kind in kinds) == 1, state


@pytest.mark.parametrize("state", sorted(FINAL))
def test_final_states_absorb(state: State) -> None:
    assert not [event for event in Event if (state, event) in TRANSITIONS]


@pytest.mark.parametrize("state", [state for state in State if state not in FINAL])
def test_no_state_is_a_trap(state: State) -> None:
    """From everywhere a final state can be reached, and by cancel and close at once."""
    assert next_state(state, Event.CANCEL) is State.CANCELLED
    assert next_state(state, Event.CLOSE) is State.CLOSED


@pytest.mark.parametrize("state", list(State))
def test_every_state_can_be_reached(state: State) -> None:
    reached: set[State] = set()
    todo: list[State | None] = [None]
    while todo:
        here = todo.pop()
        for (source, _event), target in TRANSITIONS.items():
            if source is here and target not in reached:
                reached.add(target)
                todo.append(target)
    assert state in reached


def test_every_event_has_one_target() -> None:
    for event in Event:
        assert len({target for (_, e), target in TRANSITIONS.items() if e is event}) == 1, event


def test_only_a_submit_makes_a_job() -> None:
    assert {event for (state, event) in TRANSITIONS if state is None} == {Event.SUBMIT, Event.SUBMIT_READY}


def test_only_a_claim_leases_a_job() -> None:
    into = {
        event
        for (state, event), target in TRANSITIONS.items()
        if target in LEASED and (state is None or state not in LEASED)
    }
    assert into == {Event.CLAIM}


def test_holding_and_beyond_never_run_again() -> None:
    for state in (State.HOLDING, State.TRANSFERRING, State.MERGING):
        for event in Event:
            target = TRANSITIONS.get((state, event))
            assert target not in {State.ACTIVATED, State.SENT, State.STARTING, State.RUNNING}


def test_a_pilots_transfer_never_overwrites_holding() -> None:
    assert (State.HOLDING, Event.TRANSFER) not in TRANSITIONS


def test_what_a_pilot_reports_leads_to_the_state_it_names() -> None:
    for state, event in PILOT_EVENTS.items():
        assert {target for (_, e), target in TRANSITIONS.items() if e is event} == {state}


def test_no_event_of_the_data_side_happens_twice() -> None:
    """A repeat is told by the history alone."""
    for event in DATA_EVENTS:
        todo = [target for (_, e), target in TRANSITIONS.items() if e is event]
        reached: set[State] = set()
        while todo:
            here = todo.pop()
            reached.add(here)
            todo += [target for (source, _), target in TRANSITIONS.items() if source is here and target not in reached]
        assert not {source for (source, e) in TRANSITIONS if e is event} & reached, event


@given(st.sampled_from([Event.SUBMIT, Event.SUBMIT_READY]), st.lists(st.sampled_from(list(Event)), max_size=60))
def test_no_walk_leaves_a_final_state_or_the_declared_states(first: Event, events: list[Event]) -> None:
    state = next_state(None, first)
    finals: list[State] = []
    for event in events:
        try:
            state = next_state(state, event)
        except Conflict:
            continue
        assert state in State
        if state in FINAL:
            finals.append(state)
    assert len(finals) <= 1
    assert not finals or state is finals[0]


@given(st.lists(st.sampled_from([Event.CLAIM, Event.EXPIRE, Event.RELEASE, Event.START, Event.RUN]), max_size=80))
def test_attempts_never_overlap_on_any_walk(events: list[Event]) -> None:
    """Between two claims of a job its lease has always ended (the table's part of invariant I4)."""
    state, leases = next_state(None, Event.SUBMIT_READY), 0
    for event in events:
        if (state, event) not in TRANSITIONS:
            continue
        state = next_state(state, event)
        leases += (event is Event.CLAIM) - (event in {Event.EXPIRE, Event.RELEASE})
        assert leases == (state in LEASED)
