def by(skip=True, group_from_start=False, everything=False, offset=8, last_down=False, apart=False):
    """The solution, with a mistake."""

    def columns(read_words, read_scales, size, start, stop):
        first, group = start // 8, start // size
        last, behind = (stop + 7) // 8, -(-stop // size)
        if last_down:
            last, behind = max(first + 1, stop // 8), max(group + 1, stop // size)
        if everything:
            first, last, group, behind = 0, 9, 0, -(-72 // size)
        words = [read_words(k, k + 1)[0] for k in range(first, last)] if apart else read_words(first, last)
        scales, found = read_scales(group, behind), []
        for i in range(start, stop):
            at = i if skip else i - start  # counted from the row, or from the rank's own first number
            inside = (i // 8 - first, i % 8) if skip else (at // 8, at % 8)
            of = (i - start) // size if group_from_start else i // size - group
            code = (words[inside[0]] >> 4 * inside[1] & 15) - offset
            found.append(code * scales[of])
        return found

    return columns


WRONG = [
    ({"columns": by(skip=False)}, "numbers 6 .. 9"),
    ({"columns": by(group_from_start=True)}, "numbers 6 .. 9"),
    ({"columns": by(everything=True)}, "words that are read"),
    ({"columns": by(offset=0)}, "numbers 0 .. 7"),
    ({"columns": by(last_down=True)}, "wanted"),
    ({"columns": by(apart=True)}, "words that are read"),
]
