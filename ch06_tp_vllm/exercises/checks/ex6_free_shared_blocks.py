from types import ModuleType

from common.teaching.expect import ask, expect


def check(m: ModuleType) -> None:
    table, ref_cnt, free_list = [4, 7, 2], {4: 2, 7: 1, 2: 1, 9: 0}, [9]
    ask(m.free_request, table, ref_cnt, free_list)
    expect("ref_cnt: each block of the request is held by one less", ref_cnt, {4: 1, 7: 0, 2: 0, 9: 0})
    expect("is block 4 free, which another request holds", 4 in free_list, False)
    expect("free_list: behind the others, the tail before the head, which others are likelier to ask for", free_list,
           [9, 2, 7])  # fmt: skip
    expect("the block table, which stays as it is", table, [4, 7, 2])
    ask(m.free_request, [4], ref_cnt, free_list)
    expect("free_list, when the last one who held block 4 has let it go", free_list, [9, 2, 7, 4])
    expect("ref_cnt then", ref_cnt, {4: 0, 7: 0, 2: 0, 9: 0})
    ask(m.free_request, [], ref_cnt, free_list)
    expect("free_list, after a request without blocks", free_list, [9, 2, 7, 4])
