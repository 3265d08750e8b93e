"""Exercise 1: Events out of pieces (20 minutes).

Read  "Cumulative or delta" in the chapter
Edit  this file
Test  python -m ch07_sglang_radix.serving.exercises.check 1

A stream of server-sent events is lines of text, and an empty line ends an event. What a client gets are pieces of bytes, cut
wherever the network liked: in the middle of an event, of a line end, of a character. Write the step that takes one piece:

    rest       bytes of the last call that were not a whole event yet; b"" at the beginning
    piece      the bytes that have just come
    returns    (data, rest): the data of each event that is whole now, in order, as texts; and what must wait

A line ends with \n or with \r\n. Lines that begin with "data:" carry data, without the one space that may follow the colon; an
event with several of them has their texts joined by \n. Other lines (comments begin with a colon, or "id: 7") carry none,
and an event without data is no event. The text is UTF-8.

    b"",  b'data: {"a": 1}\n\ndata: [DO'   ->  ['{"a": 1}'], b"data: [DO"
    b"data: [DO", b"NE]\n\n"               ->  ["[DONE]"], b""
"""


def events(rest: bytes, piece: bytes) -> tuple[list[str], bytes]:
    raise NotImplementedError  # your turn
