from ch07_sglang_radix.quantization.exercises.solutions.ex1_nibble_order import pack, unpack


def high_first(words, bits, count):
    per = 32 // bits
    return [(words[i // per] & 0xFFFFFFFF) >> bits * (per - 1 - i % per) & (1 << bits) - 1 for i in range(count)]


def bytes_turned(words, bits, count):
    """The high nibble of each byte first."""
    codes = unpack(words, bits, len(words) * 32 // bits)
    return [codes[i ^ 1] if bits == 4 else codes[i] for i in range(count)]


def words_apart(words, bits, count):
    """No code crosses words: ten of 3 bits in each."""
    per = 32 // bits
    return [words[i // per] >> bits * (i % per) & (1 << bits) - 1 for i in range(count)]


def sign_kept(words, bits, count):
    string = sum(word << 32 * i for i, word in enumerate(words))
    return [string >> bits * i & (1 << bits) - 1 for i in range(count)]


def unsigned(codes, bits):
    return [word & 0xFFFFFFFF for word in pack(codes, bits)]


def one_word_too_many(codes, bits):
    return [*pack(codes, bits), 0] if len(codes) * bits % 32 == 0 else pack(codes, bits)


WRONG = [
    ({"unpack": high_first}, "unpack"),
    ({"unpack": bytes_turned}, "unpack"),
    ({"unpack": words_apart}, "wanted"),
    ({"unpack": sign_kept}, "unpack"),
    ({"pack": unsigned}, "pack"),
    ({"pack": one_word_too_many}, "pack"),
]
