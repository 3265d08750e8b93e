import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import multiprocessing.util
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported: kernels are tested without a GPU, too

import transformers
from hypothesis import settings

from ch07_sglang_radix.serving import child
from common.distributed import spawn
from common.parallel_state import shutdown_tensor_parallel
from tests import parts, warm
from tests.oracle import SMALL, save_random
from tests.ranks import RankPool

settings.register_profile("long", max_examples=3000, deadline=None)  # pytest --hypothesis-profile=long
torch.set_num_threads(1)
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


# What takes long and is long for the number of its cases: `make test` takes the first of every n cases, 0 is none. Each n is
# such that the cases it takes have both values of a switch, every family of models, both ways to start a command and so on;
# a test with 0 has a smaller one of its kind beside it. Whatever needs more than two ranks is left out, too. `make test-all`
# leaves out nothing.
THOROUGH = {
    "notebooks/ch06_2_communication.ipynb": 0,
    "notebooks/ch06_3_paged_kv.ipynb": 0,
    "notebooks/ch07_10_disaggregation.ipynb": 0,
    "notebooks/ch07_11_adapters_and_images.ipynb": 0,
    "notebooks/ch07_1_radix_tree.ipynb": 0,
    "notebooks/ch07_2_hit_rates.ipynb": 0,
    "notebooks/ch07_3_control_plane.ipynb": 0,
    "notebooks/ch07_4_serving.ipynb": 0,
    "notebooks/ch07_5_parallelism.ipynb": 0,
    "notebooks/ch07_6_costs.ipynb": 0,
    "notebooks/ch07_7_experts.ipynb": 0,
    "notebooks/ch07_8_bytes.ipynb": 0,
    "notebooks/ch07_9_speculation.ipynb": 0,
    "tests/ch06/test_equality.py::test_n_answers_are_n_times_the_same_when_greedy": 2,
    "tests/ch06/test_equality.py::test_tokens_equal_transformers": 8,
    "tests/ch06/test_equality.py::test_tokens_equal_transformers_on_the_bundled_model": 2,
    "tests/ch06/test_expert_parallel.py": 0,
    "tests/ch06/test_llm.py::test_a_stop_text_ends_the_answer_before_it_wherever_it_lies": 3,
    "tests/ch06/test_lora_request.py::test_tokens_equal_peft_in_any_mix": 2,
    "tests/ch06/test_ngram_proposer.py::test_greedy_tokens_equal_transformers_whether_guesses_are_right_or_wrong": 2,
    "tests/ch06/test_projects.py::test_a_plausible_mistake_is_found": 4,
    "tests/ch06/test_projects.py::test_the_solution_gets_all_points": 4,
    "tests/ch06/test_readme.py::test_a_command_of_the_exercises_runs": 2,
    "tests/ch06/test_readme.py::test_the_command_prints_what_is_shown": 0,
    "tests/ch07/adapters/test_engine.py::test_ranks_that_an_engine_starts_load_and_forget_as_rank_0_says": 0,
    "tests/ch07/adapters/test_equality.py::test_a_mixed_batch_says_what_each_adapter_says_alone": 3,
    "tests/ch07/adapters/test_readme.py::test_the_command_prints_what_is_shown": 0,
    "tests/ch07/adapters/test_server.py::test_two_ranks_serve_adapters_too": 0,
    "tests/ch07/adapters/test_weight_updater.py::test_steps_on_their_way_through_stages_come_back_before_the_ranks_are_asked": 0,
    "tests/ch07/adapters/test_weights_in_flight.py::test_on_several_ranks_too": 3,
    "tests/ch07/adapters/test_weights_in_flight.py::test_tokens_of_every_family_and_mode_equal_transformers": 2,
    "tests/ch07/benchmarks/test_bench_layouts.py": 0,
    "tests/ch07/benchmarks/test_replicas.py": 0,
    "tests/ch07/benchmarks/test_simulate.py::test_the_command": 0,
    "tests/ch07/disaggregation/test_deaths.py": 0,
    "tests/ch07/disaggregation/test_equality.py::test_latent_pages_are_whole_on_every_rank_and_the_tokens_transformers_too": 0,
    "tests/ch07/disaggregation/test_equality.py": 6,
    "tests/ch07/disaggregation/test_mini_lb.py": 0,
    "tests/ch07/disaggregation/test_readme.py::test_the_command_prints_what_is_shown": 0,
    "tests/ch07/disaggregation/test_router.py": 0,
    "tests/ch07/experts/test_equality.py::test_tokens_of_chapter_6_equal_transformers": 3,
    "tests/ch07/experts/test_equality.py::test_tokens_of_chapter_7_equal_transformers": 3,
    "tests/ch07/experts/test_expert_load.py::test_a_rank_that_dies_while_weights_move_ends_the_others_with_its_name": 0,
    "tests/ch07/experts/test_expert_load.py::test_a_server_says_how_even_its_ranks_are": 0,
    "tests/ch07/experts/test_expert_load.py::test_the_mixture_of_equal_experts_answers_as_the_dense_model_while_they_move": 0,
    "tests/ch07/experts/test_expert_load.py::test_without_the_flags_nothing_is_read_and_no_message_sent": 0,
    "tests/ch07/experts/test_readme.py::test_the_command_prints_what_is_shown": 4,
    "tests/ch07/experts/test_rebalancing.py::test_experts_move_in_the_middle_of_requests_and_no_token_notices": 5,
    "tests/ch07/images/test_equality.py::test_tokens_equal_transformers": 5,
    "tests/ch07/images/test_equality.py::test_tokens_equal_transformers_on_two_ranks": 2,
    "tests/ch07/images/test_readme.py::test_the_command_prints_what_is_shown": 0,
    "tests/ch07/images/test_server.py::test_a_picture_is_shown_in_every_dialect_and_found_in_the_tree": 0,
    "tests/ch07/parallelism/test_combinations.py": 0,
    "tests/ch07/parallelism/test_context_parallel.py::test_tokens_equal_transformers": 0,
    "tests/ch07/parallelism/test_readme.py::test_a_demo_of_several_ranks_says_how_it_is_started": 3,
    "tests/ch07/parallelism/test_readme.py::test_the_command_prints_what_is_shown": 5,
    "tests/ch07/parallelism/test_replica_engine.py::test_a_replica_that_dies_takes_its_requests_and_the_last_one_the_engine": 0,
    "tests/ch07/parallelism/test_replica_engine.py::test_replicas_that_do_not_start_are_one_line": 0,
    "tests/ch07/parallelism/test_replica_engine.py": 4,
    "tests/ch07/parallelism/test_replicas.py::test_a_replica_that_cannot_start_ends_the_server_with_its_reason": 0,
    "tests/ch07/parallelism/test_replicas.py::test_a_replica_that_is_killed_takes_its_own_requests_and_the_rest_goes_on": 0,
    "tests/ch07/parallelism/test_replicas.py::test_a_streaming_session_outlives_the_replica_that_has_it": 0,
    "tests/ch07/parallelism/test_replicas.py::test_when_the_last_replica_has_died_the_server_ends_and_says_so": 0,
    "tests/ch07/parallelism/test_router_process.py::test_two_servers_behind_a_router_are_one_that_survives_either": 0,
    "tests/ch07/quantization/test_readme.py::test_the_command_prints_what_is_shown": 0,
    "tests/ch07/quantization/test_tiers_engine.py::test_another_engine_finds_what_this_one_has_computed": 3,
    "tests/ch07/quantization/test_tiers_engine.py::test_nothing_changes_an_answer": 3,
    "tests/ch07/quantization/test_tiers_engine.py::test_nothing_changes_an_answer_on_two_ranks": 0,
    "tests/ch07/serving/deploy/test_ray_serve_app.py": 0,
    "tests/ch07/serving/test_child.py": 0,
    "tests/ch07/serving/test_grpc.py::test_a_server_answers_both_and_ends_in_good_order": 0,
    "tests/ch07/serving/test_life_and_death.py::test_a_client_that_goes_away_has_its_request_aborted": 2,
    "tests/ch07/serving/test_life_and_death.py::test_a_second_signal_ends_now": 0,
    "tests/ch07/serving/test_life_and_death.py::test_a_signal_while_it_loads_ends_it": 0,
    "tests/ch07/serving/test_life_and_death.py::test_a_step_that_takes_too_long_ends_the_server_and_shows_where": 0,
    "tests/ch07/serving/test_life_and_death.py::test_nothing_grows_with_the_requests_that_have_been": 0,
    "tests/ch07/serving/test_life_and_death.py::test_sigterm_lets_running_requests_end_and_takes_no_new_ones": 0,
    "tests/ch07/serving/test_life_and_death.py::test_when_one_is_killed_all_end": 12,
    "tests/ch07/serving/test_life_and_death.py::test_when_one_is_stopped_all_others_end_in_the_watchdog_s_time": 0,
    "tests/ch07/serving/test_life_and_death.py::test_who_is_not_done_when_the_time_is_up_hears_so": 0,
    "tests/ch07/serving/test_load.py::test_a_thousand_clients_of_whom_some_leave_and_some_send_rubbish": 0,
    "tests/ch07/serving/test_load.py": 0,
    "tests/ch07/serving/test_metrics.py::test_a_server_of_several_processes_counts_each_request_once_and_no_probe": 0,
    "tests/ch07/serving/test_openai_grammar.py": 8,
    "tests/ch07/serving/test_openai_server.py::test_a_model_that_thinks_and_calls_by_itself": 2,
    "tests/ch07/serving/test_openai_server.py::test_the_same_in_a_stream_where_nothing_is_taken_back": 2,
    "tests/ch07/serving/test_openai_server.py::test_the_whole_text_is_what_transformers_says": 2,
    "tests/ch07/serving/test_openai_server.py::test_tokens_of_the_thought_are_counted": 2,
    "tests/ch07/serving/test_openapi_fuzz.py": 0,
    "tests/ch07/serving/test_readme.py::test_a_conversation_in_the_terminal": 0,
    "tests/ch07/serving/test_readme.py::test_curl_is_answered": 0,
    "tests/ch07/serving/test_readme.py::test_the_command_prints_what_is_shown": 0,
    "tests/ch07/serving/test_readme.py::test_the_official_client_prints_what_is_shown": 0,
    "tests/ch07/serving/test_server.py::test_a_model_that_cannot_be_loaded_ends_the_server_with_its_reason": 0,
    "tests/ch07/serving/test_server.py::test_a_profile_has_a_file_a_rank": 0,
    "tests/ch07/serving/test_server.py::test_every_call_answers_what_the_engine_answers": 2,
    "tests/ch07/serving/test_server.py::test_what_cannot_start_is_one_line": 3,
    "tests/ch07/serving/test_sessions.py": 2,
    "tests/ch07/serving/test_weights.py::test_replicas_sleep_together_and_change_together": 0,
    "tests/ch07/serving/test_wiretap.py": 0,
    "tests/ch07/serving/xray/test_mount.py": 0,
    "tests/ch07/serving/xray/test_page.py": 0,
    "tests/ch07/speculative/test_eagle.py::test_no_guess_changes_an_answer": 0,
    "tests/ch07/speculative/test_edges.py::test_guesses_change_nothing_over_ranks_experts_and_replicas": 0,
    "tests/ch07/speculative/test_edges.py": 3,
    "tests/ch07/speculative/test_engine.py::test_everything_a_request_may_ask_for_holds_inside_runs": 3,
    "tests/ch07/speculative/test_latent.py::test_tokens_equal_transformers_whether_guesses_are_right_or_wrong": 4,
    "tests/ch07/speculative/test_readme.py::test_the_command_prints_what_is_shown": 0,
    "tests/ch07/speculative/test_server.py": 0,
    "tests/ch07/test_attention_data_parallel.py::test_a_data_rank_that_is_killed_is_named": 0,
    "tests/ch07/test_attention_data_parallel.py::test_nothing_changes_an_answer": 2,
    "tests/ch07/test_demo.py::test_a_killed_rank_ends_the_others_and_is_named": 2,
    "tests/ch07/test_demo.py::test_a_process_says_nothing_but_this_line_and_exits_with_1": 2,
    "tests/ch07/test_demo.py::test_the_report_says_what_was_asked_for": 0,
    "tests/ch07/test_demo.py::test_two_ranks_say_it_once": 2,
    "tests/ch07/test_demo.py::test_two_replicas_of_two_ranks_torchrun_s_four": 0,
    "tests/ch07/test_demo.py::test_two_stages_give_the_same_answers_and_say_what_the_formula_says": 0,
    "tests/ch07/test_deterministic_inference.py::test_alone_and_in_any_company": 2,
    "tests/ch07/test_engine_api.py::test_abort_at_any_moment_gives_every_page_back": 3,
    "tests/ch07/test_equality.py::test_the_small_pool_did_retract": 0,
    "tests/ch07/test_equality.py::test_tokens_equal_transformers": 18,
    "tests/ch07/test_equality.py::test_tokens_equal_transformers_on_the_bundled_model": 3,
    "tests/ch07/test_equality.py::test_tokens_equal_transformers_on_the_real_config": 0,
    "tests/ch07/test_expert_parallel.py::test_an_engine_deals_out_its_experts_and_idle_ranks_take_part": 0,
    "tests/ch07/test_expert_parallel.py::test_every_family_of_mixtures": 6,
    "tests/ch07/test_expert_parallel.py::test_nothing_changes_an_answer": 4,
    "tests/ch07/test_expert_parallel.py::test_pages_written_before_experts_moved_are_right_afterwards": 2,
    "tests/ch07/test_expert_parallel.py::test_replicas_have_experts_of_their_own": 0,
    "tests/ch07/test_grammar_manager.py::test_twenty_of_twenty_random_schemas_are_obeyed_at_temperature_1": 2,
    "tests/ch07/test_grammar_manager.py::test_two_ranks_answer_alike_and_rank_0_alone_masks": 0,
    "tests/ch07/test_hosts.py::test_tokens_of_an_engine_on_two_hosts_equal_transformers": 2,
    "tests/ch07/test_hosts.py::test_when_one_is_killed_the_other_host_ends_and_names_it": 0,
    "tests/ch07/test_kv_dtypes.py::test_layouts_change_nothing": 6,
    "tests/ch07/test_kv_dtypes.py::test_pages_chunks_trees_and_retractions_change_nothing": 4,
    "tests/ch07/test_kv_dtypes.py::test_ranks_change_nothing": 0,
    "tests/ch07/test_lanes.py::test_any_options_give_the_same_tokens_and_keep_every_page": 0,
    "tests/ch07/test_latent_attention.py::test_tokens_equal_transformers": 3,
    "tests/ch07/test_latent_attention.py::test_tokens_equal_transformers_in_every_layout": 0,
    "tests/ch07/test_overlap.py::test_same_answers_with_and_without": 4,
    "tests/ch07/test_pipeline.py::test_a_server_of_two_stages_answers": 0,
    "tests/ch07/test_pipeline.py::test_a_stage_that_is_lost_ends_the_others_and_is_named": 0,
    "tests/ch07/test_product.py::test_nothing_changes_an_answer": 0,
    "tests/ch07/test_projects.py::test_a_plausible_mistake_is_found": 4,
    "tests/ch07/test_projects.py::test_the_solution_gets_all_points": 2,
    "tests/ch07/test_projects.py": 4,
    "tests/ch07/test_readme.py::test_the_command_prints_what_is_shown": 0,
    "tests/ch07/test_replicated.py::test_both_designs_give_the_same_answers": 2,
    "tests/ch07/test_session_memory.py::test_whatever_comes_in_whatever_order_nothing_is_lost": 2,
    "tests/ch07/test_session_memory.py": 2,
    "tests/ch07/test_start.py::test_an_engine_answers_without_what_it_does_not_need": 0,
    "tests/common/distributed/test_check_plan.py": 0,
    "tests/common/distributed/test_launch.py::test_a_full_standard_output_is_named": 4,
    "tests/common/distributed/test_launch.py::test_a_rank_that_makes_fewer_calls_is_named_and_not_called_dead": 3,
    "tests/common/distributed/test_launch.py::test_a_script_may_end_without_shutdown": 0,
    "tests/common/distributed/test_launch.py::test_a_signal_to_torchrun_is_one_line_a_rank": 0,
    "tests/common/distributed/test_measure_links.py::test_every_operation_is_measured_with_every_size": 0,
    "tests/common/distributed/test_plan.py::test_the_command_ends_in_one_line": 0,
    "tests/common/distributed/test_shared_memory.py::test_a_rank_that_is_stopped_is_named_when_its_time_is_up": 0,
    "tests/common/distributed/test_shared_memory.py::test_thousands_of_random_messages_are_all_summed_right": 3,
    "tests/common/distributed/test_spawn.py::test_a_bare_script_gets_its_ranks_and_leaves_none_behind": 3,
    "tests/common/distributed/test_spawn.py::test_a_notebook_gets_its_ranks_again_each_time_a_cell_is_run": 0,
    "tests/common/distributed/test_spawn.py::test_a_rank_that_stays_away_is_ended_with_the_others": 0,
    "tests/common/distributed/test_spawn.py::test_ctrl_c_ends_all_in_one_line": 0,
    "tests/common/distributed/test_spawn.py::test_ranks_end_with_a_rank_0_that_is_killed": 0,
    "tests/common/distributed/test_spawn.py::test_ranks_end_with_a_rank_0_that_is_killed_before_they_can_hear_it": 0,
    "tests/common/distributed/test_spawn.py::test_ranks_start_in_the_folder_of_rank_0_and_import_what_it_imports": 0,
    "tests/common/distributed/test_spawn.py::test_start_and_shut_down_ten_times": 0,
    "tests/common/distributed/test_spawn.py::test_what_a_rank_says_before_it_dies_is_part_of_the_error": 0,
    "tests/common/layers/test_compiled.py": 0,
    "tests/common/layers/test_cpu_linear.py::test_tokens_equal_transformers_in_any_form": 4,
    "tests/common/layers/test_dispatch.py::test_every_choice_comes_home_from_its_expert": 3,
    "tests/common/models/drafters/test_eagle.py::test_every_guess_is_that_of_a_dense_layer": 8,
    "tests/common/models/drafters/test_standalone.py::test_the_target_as_its_own_draft_is_always_right": 4,
    "tests/common/models/test_adapter_files.py::test_a_damaged_folder_gives_what_peft_computes_or_one_line": 16,
    "tests/common/models/test_damaged_folders.py::test_a_damaged_folder_gives_the_right_model_or_one_line": 16,
    "tests/common/models/test_new_weights.py::test_a_checkpoint_is_written_as_a_fresh_load_would_have_it": 4,
    "tests/common/models/test_new_weights.py::test_each_rank_writes_and_tells_its_own_part": 3,
    "tests/common/models/test_new_weights.py::test_some_tensors_are_written_and_all_others_stay": 4,
    "tests/common/planner/test_mixtures.py::test_a_step_sends_what_the_ledger_records": 5,
    "tests/common/planner/test_mixtures.py::test_the_weights_of_every_rank_are_those_of_the_model": 4,
    "tests/common/quantization/test_checkpoints.py::test_a_rank_holds_what_the_codes_stand_for": 3,
    "tests/common/quantization/test_checkpoints.py::test_a_rank_may_keep_the_codes": 3,
    "tests/common/quantization/test_make.py::test_gptq_calibrates_layer_by_layer_and_is_nearer_on_other_text": 0,
    "tests/common/test_check_environment.py::test_this_machine_can_run_it": 0,
    "tests/common/test_experts_over_ranks.py": 4,
    "tests/common/test_lora.py::test_each_request_gets_the_tokens_that_its_adapter_gives_in_transformers": 5,
    "tests/common/test_memory_occupation.py::test_weights_come_back_as_they_were": 4,
    "tests/common/test_parallel_state.py::test_a_rank_that_stays_away_is_not_called_dead": 0,
    "tests/common/test_parallel_state.py::test_a_stopped_rank_is_named": 0,
    "tests/common/tiny_qwen/test_tiny_qwen.py::test_answers_are_exact": 2,
    "tests/test_api_values.py": 4,
    "tests/test_started_ranks.py::test_a_step_that_rank_0_breaks_off_is_an_error_at_once_and_the_last": 3,
}


def pytest_configure(config):
    settings.register_profile("all", max_examples=100, deadline=None)
    settings.register_profile("test", max_examples=20, deadline=None)
    if not config.getoption("--hypothesis-profile"):
        settings.load_profile("test" if _is_quick(config) else "all")


def _is_quick(config) -> bool:
    return config.getoption("-m") == "not thorough"


@pytest.hookimpl(tryfirst=True)  # before -m looks at the marks
def pytest_collection_modifyitems(items):
    """Mark what starts several ranks, and what is thorough. Tests of one number of ranks stand together, the others first:
    a worker keeps two pools of ranks only, and a new one takes seconds to start."""
    seen: Counter[str] = Counter()
    for item in items:
        size = _number_of_ranks(item)
        if size:
            item.add_marker(pytest.mark.ranks)
        name = item.nodeid.partition("[")[0]
        every = next((n for test, n in THOROUGH.items() if name == test or name.startswith(f"{test}::")), 1)
        if size > 2 or not every or seen[name] % every:
            item.add_marker(pytest.mark.thorough)
        seen[name] += 1
    items.sort(key=_number_of_ranks)  # stable


def _number_of_ranks(item) -> int:
    """0 for a test in one process."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    starts = "ranks" in set(getattr(item, "fixturenames", ())) - set(params) or "torchrun" in item.name
    files = ("test_demo.py", "test_parallel_state.py", "test_started_ranks.py", "test_spawn.py", "test_launch.py")
    if not starts and item.path.name not in files:
        return 0
    return next((size for name in ("size", "answers") if isinstance(size := params.get(name), int) and size > 0), 2)


def pytest_terminal_summary(terminalreporter, config):
    """How long each part took (parts.py); what `make test` and `make test-all` cover, in a line each."""
    took = parts.said(
        report for kind in ("", "passed", "failed", "error") for report in terminalreporter.getreports(kind)
    )
    if took:
        terminalreporter.write_line(took)
    if _is_quick(config):
        terminalreporter.write_line(
            "covered: every kind of test, on one and two ranks, and a notebook. `make test-all` adds further cases of the same, "
            "three and four ranks, a model of real size, all commands of the READMEs and all notebooks."
        )
    elif "notebooks" in config.args:
        terminalreporter.write_line(
            "covered: everything, on one to four ranks, with all commands of the READMEs and all notebooks."
        )


@pytest.fixture(autouse=True)
def no_group_left_over():
    """A test that picked a device for the process must not pick it for the next one."""
    yield
    shutdown_tensor_parallel()


@pytest.fixture(scope="session", autouse=True)
def forked():
    """The ranks and replicas that an engine in this process starts are forked (warm.py): 1.1 CPU seconds each, not 2.9.

    That they start as Python processes do is held where a script, a notebook or a server starts them.
    """
    multiprocessing.util.get_temp_dir()  # made now: some tests have a temporary folder of their own, which must stay empty
    with pytest.MonkeyPatch.context() as patch:
        for module in (spawn, child):
            patch.setattr(module, "subprocess", SimpleNamespace(**vars(subprocess) | {"Popen": warm.Popen}))
        yield


@pytest.fixture(scope="session")
def ranks():
    """ranks(R) -> a RankPool of R processes, started on first use and kept; at most two sizes at a time."""
    pools: dict[int, RankPool] = {}

    def get(size: int) -> RankPool:
        if size not in pools or pools[size].broken:
            while len(pools) > 1:
                pools.pop(next(iter(pools))).close()
            pools[size] = RankPool(size)
        return pools[size]

    yield get
    for pool in pools.values():
        pool.close()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """checkpoint(name) -> folder with random weights in that config (see oracle.SMALL), made once."""
    made = {}

    def get(name: str):
        assert name in SMALL
        if name not in made:
            made[name] = save_random(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


@pytest.fixture
def copy(checkpoint, tmp_path):
    """copy(name) -> a copy of that checkpoint, to be changed."""
    return lambda name: Path(shutil.copytree(checkpoint(name), tmp_path / name))
