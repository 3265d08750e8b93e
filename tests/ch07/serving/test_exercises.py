"""The checks of the wing's exercises: which wrong answers they find."""

import asyncio
from types import SimpleNamespace

import pytest

from ch07_sglang_radix.serving.exercises.check import EXERCISES

module_of, outcome = EXERCISES.module_of, EXERCISES.outcome


def right(number):
    return module_of(number, solutions=True)


# --- 1: events


def cuts_at_newlines(rest, piece):
    *lines, rest = (rest + piece).split(b"\n")
    return [line[5:].strip().decode() for line in lines if line.startswith(b"data:")], rest


def forgets_the_rest(rest, piece):
    return right(1).events(b"", piece)[0], b""


def line_feeds_only(rest, piece):
    *events, rest = (rest + piece).split(b"\n\n")
    data = [[line[5:].removeprefix(b" ") for line in one.split(b"\n") if line.startswith(b"data:")] for one in events]
    return [b"\n".join(lines).decode() for lines in data if lines], rest


def last_line_wins(rest, piece):
    found, rest = right(1).events(rest, piece)
    return [one.split("\n")[-1] for one in found], rest


def strips_all_blanks(rest, piece):
    found, rest = right(1).events(rest, piece)
    return ["\n".join(line.strip() for line in one.split("\n")) for one in found], rest


def drops_empty_data(rest, piece):
    found, rest = right(1).events(rest, piece)
    return [one for one in found if one], rest


def replaces_half_characters(rest, piece):
    text = rest.decode("utf-8", "replace") + piece.decode("utf-8", "replace")
    found, rest = right(1).events(b"", text.encode())
    return found, rest


# --- 2: new text


def token_alone(ids, surr, read, decode):
    return decode(ids[-1:]), surr, read


def all_each_time(ids, surr, read, decode):
    text = decode(ids)
    return ("", surr, read) if text.endswith("\ufffd") else (text[read:], 0, len(text))


def no_context(ids, surr, read, decode):
    text = decode(ids[read:])
    return ("", surr, read) if text.endswith("\ufffd") else (text, read, len(ids))


def never_waits(ids, surr, read, decode):
    return decode(ids[surr:])[len(decode(ids[surr:read])) :], read, len(ids)


def waits_a_token_longer(ids, surr, read, decode):
    text, new_surr, new_read = right(2).new_text(ids[:-1], surr, read, decode) if len(ids) > 1 else ("", surr, read)
    return text, new_surr, new_read


def surr_stays(ids, surr, read, decode):
    text, _, read = right(2).new_text(ids, surr, read, decode)
    return text, 0, read


# --- 3: certain


def first_stop_only(text, stops):
    return right(3).certain(text, stops[:1])


def shortest_beginning(text, stops):
    halves = [size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size])]
    return len(text) - min(halves, default=0)


def as_long_as_a_stop(text, stops):
    return max(0, len(text) - max(map(len, stops), default=1) + 1)


def first_letter_anywhere(text, stops):
    return min([at for stop in stops if (at := text.find(stop[0])) >= 0], default=len(text))


def the_whole_stop_too(text, stops):
    halves = [size for stop in stops for size in range(1, len(stop) + 1) if text.endswith(stop[-size:])]
    return len(text) - max(halves, default=0)


# --- 4: the mask


def _allowed(text, may_begin, complete, vocab, end, *, ends=None, empty=False, first=False):
    ends = ends or complete
    return [
        ends(text) if i == end else (empty or piece != "") and may_begin(text + (piece[:1] if first else piece))
        for i, piece in enumerate(vocab)
    ]  # fmt: skip


def _with(function, **fixed):
    return lambda *args: function(*args, **fixed)


def end_alone_where_it_may(text, may_begin, complete, vocab, end):
    """A text that is complete may go on."""
    found = right(4).allowed(text, may_begin, complete, vocab, end)
    return [i == end for i in range(len(vocab))] if complete(text) else found


def unsigned(allowed):
    return [word % (1 << 32) for word in right(4).bitmask(allowed)]


def big_end_first(allowed):
    bits = list(allowed) + [False] * (-len(allowed) % 32)
    return right(4).bitmask([bit for i in range(0, len(bits), 32) for bit in bits[i : i + 32][::-1]])


def one_word_more(allowed):
    return right(4).bitmask([*allowed, *[False] * 32])


# --- 5: the client


async def looks_between_tokens(pieces, send, gone, abort):
    watching = asyncio.ensure_future(gone())
    try:
        async for piece in pieces:
            if watching.done():
                abort()
                return False
            await send(piece)
            await asyncio.sleep(0)
        return True
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


async def never_looks(pieces, send, gone, abort):
    try:
        async for piece in pieces:
            await send(piece)
    except ConnectionError:
        abort()
        return False
    return True


async def aborts_always(pieces, send, gone, abort):
    def once():
        nonlocal calls
        calls += 1

    calls = 0
    try:
        return await right(5).answer(pieces, send, gone, once)
    finally:
        abort()


async def aborts_twice(pieces, send, gone, abort):
    return await right(5).answer(pieces, send, gone, lambda: (abort(), abort()))


async def swallows_the_cancellation(pieces, send, gone, abort):
    try:
        return await right(5).answer(pieces, send, gone, abort)
    except asyncio.CancelledError:
        return False


async def leaves_a_task(pieces, send, gone, abort):
    async def send_all():
        async for piece in pieces:
            await send(piece)

    tasks = [asyncio.ensure_future(send_all()), asyncio.ensure_future(gone())]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    if tasks[0].done() and not tasks[0].exception():
        return True
    abort()
    return False


async def swallows_the_error(pieces, send, gone, abort):
    try:
        return await right(5).answer(pieces, send, gone, abort)
    except RuntimeError:
        return False


async def forgets_to_abort_when_cancelled(pieces, send, gone, abort):
    calls = []
    try:
        done = await right(5).answer(pieces, send, gone, lambda: calls.append(1))
    except RuntimeError:
        abort()
        raise
    if not done:
        abort()
    return done


# --- 6: the end


def _react(
    life, event, now, patience, *, ready=False, twice=True, at_once=True, limit=True, code=None, tell=True, late=0
):
    before, told = dict(life), dict(life["told"])
    if event == ("SIGTERM",) and life["deadline"] is not None and not twice:
        life["deadline"] = now + patience
        return None
    status = right(6).react(life, event, now - (late if event[0] == "tick" else 0), patience)
    if life["exit"] is not None and before["exit"] is None:
        if code is not None:
            life["exit"] = code
        if not tell:
            life["told"] = told
        if not at_once and event == ("SIGTERM",):
            life["exit"] = None
        if not limit and event == ("tick",):
            life |= before
    if ready and life["exit"] is None and event[0] == "SIGTERM":
        life["ready"] = True
    return status


def goes_on_after_the_end(life, event, now, patience):
    if life["exit"] is not None and event[0] == "SIGTERM":
        life["exit"] = 0
        return None
    return right(6).react(life, event, now, patience)


# --- 7: the key


def _equal(given, wanted, *, early=False, lengths=True, half=False, total=False):
    if lengths and len(given) != len(wanted):
        return False
    different = 0
    for a, b in zip(given, wanted, strict=False):
        if early and a != b:
            return False
        different = different + a - b if total else (a ^ b) if half else different | (a ^ b)
    return different == 0


def _authorized(header, key, equal, *, prefix="bearer", lower=True, strip=True, none=True, direct=False, bare=False):
    if key is None and none:
        return True
    kind, _, given = (header or "").partition(" ")
    given = given.strip() if strip else given
    if bare and not given:
        kind, given = "Bearer", header or ""
    if (kind.lower() if lower else kind) != (prefix if lower else "Bearer"):
        return False
    return given == key if direct else equal(given.encode(), (key or "").encode())


def texts_are_compared(header, key, equal):
    return right(7).authorized(header, key, lambda a, b: equal(a.decode(), b.decode()))


# (exercise, what is wrong in the answer, words of the complaint)
WRONG = [
    (1, {"events": cuts_at_newlines}, "got (['a'], b''), wanted ([], b'data: a\\n')"),
    (1, {"events": forgets_the_rest}, "(data, rest)"),
    (1, {"events": line_feeds_only}, "a whole stream in one piece"),
    (1, {"events": last_line_wins}, "a whole stream in one piece"),
    (1, {"events": strips_all_blanks}, "a whole stream in one piece"),
    (1, {"events": drops_empty_data}, "a whole stream in one piece"),
    (1, {"events": replaces_half_characters}, "the same byte by byte"),
    (2, {"new_text": token_alone}, "e9, 95, bf"),
    (2, {"new_text": all_each_time}, "not all decoded each time"),
    (2, {"new_text": no_context}, "words that lose their space"),
    (2, {"new_text": never_waits}, "e9, 95, bf"),
    (2, {"new_text": waits_a_token_longer}, "e9, 95, bf"),
    (2, {"new_text": surr_stays}, "not all decoded each time"),
    (3, {"certain": lambda text, stops: len(text)}, "got 3, wanted 2"),
    (3, {"certain": first_stop_only}, "that may be sent"),
    (3, {"certain": shortest_beginning}, "that may be sent"),
    (3, {"certain": as_long_as_a_stop}, "that may be sent"),
    (3, {"certain": first_letter_anywhere}, "that may be sent"),
    (3, {"certain": the_whole_stop_too}, "that may be sent"),
    (4, {"allowed": _with(_allowed, ends=lambda text: True)}, "tokens allowed behind ''"),
    (4, {"allowed": _with(_allowed, ends=lambda text: False)}, "tokens allowed behind 'yes'"),
    (4, {"allowed": _with(_allowed, empty=True)}, "special tokens without a text"),
    (4, {"allowed": _with(_allowed, first=True)}, "tokens allowed behind 'yes'"),
    (4, {"allowed": end_alone_where_it_may}, "tokens allowed behind 'yes'"),
    (4, {"bitmask": unsigned}, "wanted [-2147483648]"),
    (4, {"bitmask": big_end_first}, "bitmask of 3 tokens"),
    (4, {"bitmask": one_word_more}, "bitmask of 3 tokens"),
    (5, {"answer": looks_between_tokens}, "still waiting"),
    (5, {"answer": never_looks}, "still waiting"),
    (5, {"answer": aborts_always}, "all three tokens come: times that abort was called: got 1, wanted 0"),
    (5, {"answer": aborts_twice}, "got 2, wanted 1"),
    (5, {"answer": swallows_the_cancellation}, "it is cancelled while it waits: what happened: got False"),
    (5, {"answer": leaves_a_task}, "tasks left behind"),
    (5, {"answer": swallows_the_error}, "`pieces` raises RuntimeError: what happened: got False"),
    (5, {"answer": forgets_to_abort_when_cancelled}, "it is cancelled while it waits: times that abort was called: got 0"),
    (6, {"react": _with(_react, ready=True)}, "SIGTERM while a and b run: life"),
    (6, {"react": _with(_react, twice=False)}, "two SIGTERMs while a runs"),
    (6, {"react": _with(_react, at_once=False)}, "SIGTERM and nothing runs"),
    (6, {"react": _with(_react, limit=False)}, "b is not at 40"),
    (6, {"react": _with(_react, late=0.5)}, "b is not at 40"),
    (6, {"react": _with(_react, code=0)}, "two SIGTERMs while a runs"),
    (6, {"react": _with(_react, tell=False)}, "who was told"),
    (6, {"react": goes_on_after_the_end}, "after the end: exit code"),
    (7, {"equal": _with(_equal, early=True)}, "looks at each byte"),
    (7, {"equal": lambda given, wanted: given == wanted}, "looks at each byte"),
    (7, {"equal": lambda given, wanted: all(a == b for a, b in zip(given, wanted, strict=True))}, "looks at each byte"),
    (7, {"equal": lambda given, wanted: bytes(given) == bytes(wanted)}, "got TypeError"),
    (7, {"equal": _with(_equal, lengths=False)}, "b'' and b'a': got True"),
    (7, {"equal": _with(_equal, half=True)}, "are they the same"),
    (7, {"equal": _with(_equal, total=True)}, "b'ab' and b'ba': got True"),
    (7, {"authorized": _with(_authorized, lower=False)}, "'bearer sesame'"),
    (7, {"authorized": _with(_authorized, strip=False)}, "'BEARER   sesame '"),
    (7, {"authorized": _with(_authorized, none=False)}, "Authorization: None, key None"),
    (7, {"authorized": _with(_authorized, direct=True)}, "what `equal` was given"),
    (7, {"authorized": _with(_authorized, bare=True)}, "Authorization: 'sesame'"),
    (7, {"authorized": texts_are_compared}, "wanted bytes"),
]  # fmt: skip


@pytest.mark.parametrize(("number", "instead", "words"), WRONG)
def test_a_plausible_wrong_answer_is_caught(number, instead, words, monkeypatch):
    check = __import__(f"ch07_sglang_radix.serving.exercises.checks.{EXERCISES.name_of(number)}", fromlist=["check"])
    if hasattr(check, "LONG_S"):
        monkeypatch.setattr(check, "LONG_S", 0.3)
    answer = SimpleNamespace(
        **{name: value for name, value in vars(right(number)).items() if callable(value)} | instead
    )
    said = outcome(number, answer)
    assert said.startswith("not yet: ")
    assert words in said
    assert "wanted " in said
    assert "got " in said
    assert "\n" not in said


def test_every_exercise_has_wrong_answers_that_are_caught():
    assert all(sum(number == n for number, *_ in WRONG) >= 5 for n in EXERCISES.numbers)
