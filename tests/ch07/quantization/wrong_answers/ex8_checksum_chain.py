"""Wrong answers to exercise 8: what stands in place of the right function, and what the check says."""

from hashlib import sha256

from ch07_sglang_radix.quantization.exercises.solutions.ex8_checksum_chain import seal


def by_its_own_tokens(namespace, pages):
    return [sha256(namespace.encode() + repr(page).encode()).digest() for page in pages]


def one_namespace(namespace, pages):
    last, named = b"", []
    for page in pages:
        last = sha256(last + repr(page).encode()).digest()
        named.append(last)
    return named


def digits_run_together(namespace, pages):
    last, named = namespace, []
    for page in pages:
        last += "".join(map(str, page))
        named.append(sha256(last.encode()).digest())
    return named


def pages_run_together(namespace, pages):
    known, named = [], []
    for page in pages:
        known += page
        named.append(sha256(f"{namespace} {known}".encode()).digest())
    return named


def order_forgotten(namespace, pages):
    last, named = sha256(namespace.encode()).digest(), []
    for page in pages:
        last = sha256(last + repr(sorted(page)).encode()).digest()
        named.append(last)
    return named


def all_of_the_prompt(namespace, pages):
    return [sha256(f"{namespace} {pages} {i}".encode()).digest() for i in range(len(pages))]


def payload_alone(name, payload):
    return payload + sha256(payload).digest()


def checks_payload_alone(name, file):
    return file[:-32] if sha256(file[:-32]).digest() == file[-32:] else None


def looks_at_the_length(name, file):
    return file[:-32] if len(file) == len(seal(name, file[:-32])) else None


def name_in_front(name, payload):
    return name + payload


def looks_at_the_name(name, file):
    return file[len(name) :] if file.startswith(name) else None


def reads_what_it_must(name, file):
    """A length in front, and whatever follows behind."""
    count = int.from_bytes(file[:4], "little")
    payload, check = file[4 : 4 + count], file[4 + count : 36 + count]
    return payload if sha256(name + payload).digest() == check else None


def with_a_length(name, payload):
    return len(payload).to_bytes(4, "little") + payload + sha256(name + payload).digest()


WRONG = [
    ({"names": by_its_own_tokens}, "has the name of the one at the end of"),
    ({"names": one_namespace}, "'salt'"),
    ({"names": digits_run_together}, "has the name of"),
    ({"names": pages_run_together}, "has the name of"),
    ({"names": order_forgotten}, "has the name of"),
    ({"names": all_of_the_prompt}, "begins the same"),
    ({"seal": payload_alone, "unseal": checks_payload_alone}, "another page's name"),
    ({"unseal": looks_at_the_length}, "another page's name"),
    ({"seal": name_in_front, "unseal": looks_at_the_name}, "unseal(b''"),
    ({"seal": with_a_length, "unseal": reads_what_it_must}, "a byte too many"),
]
