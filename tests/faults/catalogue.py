"""The fault catalogue (reliability.md 5): every row, and the tests that prove its promise.

`python -m tests.faults.catalogue` prints what `make faults` runs: this folder, and the rows' tests
outside of it. With `COUNTS JUNIT...` it writes docs/reliability.md from what the tests counted
(tally.py) and how they ended, and exits 1 where a row has no test that passed, or where fewer
faults than `WANTED` were counted. test_catalogue.py holds rows and tests against the tree.
"""

from __future__ import annotations

import os
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from tests.conftest import ROOT
from tests.faults import tally

F = "tests/faults/"
STAGES, DAMAGE, DISKS = F + "test_stages.py", F + "test_damage.py", F + "test_disks.py"
CONCURRENT, FUZZ, TWINS = F + "test_concurrency.py", F + "test_fuzz.py", F + "test_twins.py"
CRASH, TRAINER = "tests/train/test_crash.py", "tests/train/test_trainer.py"
PRETRAIN, CHECKPOINT = "tests/train/test_pretrain.py", "tests/train/test_checkpoint.py"
FETCH, ARCHIVE, SOURCES = (
    "tests/core/test_fetch.py", "tests/core/test_archive.py", "tests/data/test_sources.py",
)  # fmt: skip
READERS, EXTRACT, ENCODE = (f"tests/data/test_{n}.py" for n in ("readers", "extract", "encode"))
TOKENIZER, LEDGER, LOADER = (f"tests/data/test_{n}.py" for n in ("tokenizer", "ledger", "loader"))
BPB, JUDGE, HF = "tests/eval/test_bpb.py", "tests/eval/test_judge.py", "tests/export/test_hf.py"
FILES, STAGE, ARTIFACT = (f"tests/core/test_{n}.py" for n in ("files", "stage", "artifact"))
PARAMS, FINAL = "tests/test_params.py", "tests/train/test_final.py"


@dataclass(frozen=True)
class Row:
    """What is injected and promised, `file::test` names; `gap`: what is not tested."""

    inject: str
    promise: str
    tests: tuple[str, ...]
    gap: str = ""


STRUCK = f"{STAGES}::test_a01_to_b03_struck_anywhere_the_same_command_ends_with_the_same_bytes"
ROWS: dict[str, Row] = {
    "A1": Row("SIGKILL anywhere in download", "equal bytes after the same command", (
        STRUCK, f"{F}test_download.py::test_a01_kill_anywhere_in_a_download_of_three_shards",
        f"{FETCH}::test_a_kill_at_every_write_ends_in_the_same_tree")),
    "A2": Row("SIGKILL anywhere in extract", "as A1", (STRUCK,)),
    "A3": Row("SIGKILL anywhere in tokenizer training", "as A1", (STRUCK,)),
    "A4": Row("SIGKILL anywhere in encode", "as A1", (
        STRUCK, f"{ENCODE}::test_a_killed_encoding_goes_on_after_finished_parts")),
    "A5": Row("SIGKILL anywhere in embeddings, contexts", "as A1", (
        STRUCK, f"{F}test_cvfp.py::"
        "test_a09_sweeps_killed_at_any_file_operation_end_with_the_same_bytes")),
    "A6": Row("SIGKILL anywhere in evaluate", "as A1", (
        STRUCK, f"{BPB}::test_kill_at_any_block_continues_to_the_same_number")),
    "A7": Row("SIGKILL anywhere in export", "as A1", (STRUCK,)),
    "A8": Row("SIGKILL anywhere in training, every family", "weights, state, log, curves equal", (
        STRUCK, f"{CRASH}::test_a08_training_killed_at_any_file_operation_ends_with_the_same_bytes",
        f"{CRASH}::test_a08_killed_again_during_the_recovery",
        f"{TWINS}::test_a08_twins_killed_at_random_moments_end_equal")),
    "A9": Row("SIGKILL between the parts of a step; during a swap of buffers", "as A8", (
        f"{F}test_cvfp.py::test_a09_sweeps_killed_at_any_file_operation_end_with_the_same_bytes",
        f"{TRAINER}::test_a_killed_run_ends_with_the_bits_of_an_undisturbed_one",
        f"{TRAINER}::test_a_family_may_ask_for_a_checkpoint_and_keeps_its_own_files",
        f"{TRAINER}::test_state_on_disk_of_another_generation_is_refused")),
    "A10": Row("SIGTERM, SIGINT, twice, to the group", "75, then the same bytes", (
        f"{PRETRAIN}::test_a10_a_signal_commits_and_the_same_command_ends_with_the_same_bytes",
        f"{PRETRAIN}::test_a10_two_signals_to_the_group_leave_at_once_and_lose_no_bit",
        f"{STAGE}::test_a10_a_first_signal_ends_with_75_and_leaves_no_process",
        STRUCK)),
    "A11": Row("dvc alone killed, under bash, dash, no SHELL", "no orphan; next repro ends well", (
        f"{CONCURRENT}::test_a11_a_killed_dvc_leaves_no_stage_behind",
        "tests/core/test_launch.py::test_a11_workers_die_with_a_killed_launcher",
        f"{STAGE}::test_a11_a_stage_dies_with_its_parent")),
    "A12": Row("one stage started many times at once", "one runs, others exit 4 with its pid", (
        f"{CONCURRENT}::test_a12_started_many_times_at_one_moment_exactly_one_runs",
        f"{FILES}::test_a12_a_second_holder_is_refused_at_once_and_told_the_pid")),
    "A13": Row("a finished stage again", "exit 0, no file touched", (
        f"{DISKS}::test_a13_finished_stages_touch_no_file",
        f"{PRETRAIN}::test_a13_a_finished_run_is_a_no_op_that_touches_no_file")),
    "A14": Row("loss of power", "the newest durable checkpoint loads, no manifest lies", (
        f"{F}test_power.py::test_a14_the_newest_durable_checkpoint_survives_a_loss_of_power",)),
    "A15": Row("clock set back, other host name, project moved or copied", "up to date", (
        f"{DISKS}::test_a15_moved_and_copied_projects_and_an_older_clock_change_nothing",)),
    "B1": Row("ENOSPC at every write; a tmpfs that fills up", "exit 4 with numbers, no SIGBUS", (
        STRUCK,
        f"{DISKS}::test_b01_a_disk_that_fills_up_is_exit_4_and_never_a_signal")),
    "B2": Row("estimate above the free space", "exit 4 before any work", (
        f"{FILES}::test_b2_an_estimate_above_the_free_space_stops_before_any_byte",
        f"{TRAINER}::test_b02_a_disk_too_small_for_the_checkpoints_stops_before_any_work",
        f"{SOURCES}::test_space_is_asked_for_before_the_first_byte")),
    "B3": Row("EIO on write, fsync, close; native writers under strace", "exit 4, abandoned", (
        STRUCK,
        f"{DISKS}::test_b03_native_writers_end_with_4_or_die_and_leave_no_final_name",
        f"{FILES}::test_a_failing_disk_is_one_sentence_and_leaves_nothing")),
    "B4": Row("read-only disk", "exit 4 before work", (
        f"{DISKS}::test_b04_a_read_only_project_is_exit_4_before_work",
        f"{FILES}::test_a_failing_disk_is_one_sentence_and_leaves_nothing"),
        "a file system with quotas needs root; its EDQUOT is injected"),
    "B5": Row("few descriptors, no inodes; awkward names", "works, or exit 4", (
        f"{DISKS}::test_b05_names_with_spaces_other_scripts_and_200_characters",
        f"{DISKS}::test_b05_a_disk_without_inodes_is_exit_4_and_the_same_command_ends_well",
        f"{DISKS}::test_b05_too_few_descriptors_is_a_sentence"),
        "file systems that fold case cannot be mounted without root"),
    "B6": Row("payload or manifest removed, damaged, exchanged", "exit 3, or made again", (
        f"{DAMAGE}::test_b06_damage_is_refused_or_mended_and_never_read",
        f"{ARTIFACT}::test_every_flipped_bit_of_a_manifest_is_refused")),
    "B7": Row("stale files of other parameters", "ignored, swept", (
        f"{FILES}::test_sweep_removes_stale_parts_only",
        f"{STAGE}::test_changing_an_identity_parameter_and_back_recomputes_nothing")),
    "B8": Row("no GPU, no Triton, no network", "CPU and reference path", (
        "tests/nn/test_attention.py::test_an_absent_engine_is_an_error_never_a_fallback",
        f"{PARAMS}::test_the_small_profile_is_an_empty_overlay_and_offline"),
        "a GPU that is visible without a driver needs one"),
    "C1": Row("5xx, resets, DNS failures, then success", "bounded retries, by range", (
        f"{FETCH}::test_c01_passing_failures_are_retried",
        f"{FETCH}::test_c01_retries_are_bounded_and_jittered")),
    "C2": Row("429 with Retry-After", "waits, capped", (
        f"{FETCH}::test_c02_retry_after_is_honoured_within_bounds",)),
    "C3": Row("4xx", "no retry, exit 2, no secret", (
        f"{FETCH}::test_c03_refusals_are_not_retried_and_show_no_secret",)),
    "C4": Row("wrong bodies", "never the final name", (
        f"{FETCH}::test_c04_wrong_content_never_gets_the_name",
        f"{SOURCES}::test_what_is_no_shard_never_gets_the_name_of_one")),
    "C5": Row("ranges ignored, changed ETag", "from zero, never appended", (
        f"{FETCH}::test_c05_any_doubt_starts_from_zero",)),
    "C6": Row("redirects, private addresses, DNS that changes", "refused at every hop", (
        f"{FETCH}::test_c06_a_redirect_is_checked_like_the_first_url",
        f"{FETCH}::test_c06_the_connection_goes_to_the_checked_address")),
    "C7": Row("trickle, stalls", "minimum rate, deadline", (
        f"{FETCH}::test_c07_a_trickle_is_a_stall",
        f"{FETCH}::test_c07_a_silent_handshake_is_a_stall")),
    "C8": Row("endless body, encodings, headers", "capped, refused", (
        f"{FETCH}::test_c08_an_endless_body_meets_the_cap",
        f"{FETCH}::test_c08_headers_are_bounded")),
    "C9": Row("the server changes a shard", "exit 3, the old file stays", (
        f"{FETCH}::test_c09_a_shard_that_changed_keeps_the_old_file",)),
    "C10": Row("hostile archives", "refused before extraction", (
        f"{ARCHIVE}::test_c10_names_that_leave_the_folder",
        f"{ARCHIVE}::test_c10_any_damage_is_a_sentence",
        f"{FUZZ}::test_d01_to_d05_any_bytes_are_a_value_or_a_sentence")),
    "C11": Row("some shards fail for good", "exit 3 or 4, all listed", (
        f"{FETCH}::test_c11_one_failing_does_not_stop_the_others",
        f"{FETCH}::test_c11_the_exit_code_says_what_all_failures_share")),
    "D1": Row("hostile JSON lines", "one fate each, counted", (
        f"{READERS}::test_hostile_line_has_exactly_one_fate",
        f"{FUZZ}::test_d01_to_d05_any_bytes_are_a_value_or_a_sentence",
        f"{FUZZ}::test_d01_to_d05_bytes_that_reach_new_branches_are_a_value_or_a_sentence")),
    "D2": Row("invalid UTF-8, surrogates, controls", "counted, the rest is read", (
        f"{READERS}::test_hostile_file_of_all_lines_counts_by_reason",
        "tests/data/test_clean.py::test_rules")),
    "D3": Row("empty, huge, very many documents", "bounded memory", (
        f"{READERS}::test_memory_is_bounded_by_blocks_not_by_the_file",
        f"{ENCODE}::test_memory_follows_the_batch_not_the_part")),
    "D4": Row("damaged gzip", "members read, else refused whole", (
        f"{READERS}::test_d04_damaged_gzip_is_refused_whole",
        f"{READERS}::test_every_cut_of_a_gzip_is_refused",
        f"{DAMAGE}::test_b06_damage_is_refused_or_mended_and_never_read")),
    "D5": Row("damaged Parquet", "exit 3, file and column", (
        f"{READERS}::test_d05_parquet_damage_is_named",
        f"{DAMAGE}::test_b06_damage_is_refused_or_mended_and_never_read")),
    "D6": Row("special-token strings in text", "plain text", (
        f"{TOKENIZER}::test_special_strings_in_text_are_text",)),
    "D7": Row("duplicate, renamed, reordered shards", "found by hash", (
        f"{EXTRACT}::test_d07_one_shard_twice_is_refused",
        f"{SOURCES}::test_swapped_local_shards_are_refused_by_their_checksums")),
    "D8": Row("overlap of splits, empty validation, few rows", "refused with numbers", (
        f"{LEDGER}::test_d08_an_empty_split_is_refused",
        f"{LOADER}::test_what_does_not_fit_is_refused_with_the_numbers",
        f"{EXTRACT}::test_near_copies_of_validation_text_leave_train")),
    "D9": Row("a lost document", "exit 1 at the commit", (
        f"{EXTRACT}::test_d09_ledger_balances_for_any_records",
        f"{EXTRACT}::test_d09_a_lost_document_is_a_bug")),
    "E1": Row("NaN or inf in loss or gradient", "stops before the update", (
        f"{TRAINER}::test_e01_a_non_finite_number_stops_before_the_update_and_is_named",
        f"{TRAINER}::test_e01_skipped_updates_are_counted_and_capped")),
    "E2": Row("out of memory", "exit 4 with the knobs", (
        f"{TRAINER}::test_e02_out_of_memory_shows_in_the_dry_step_with_the_three_knobs",
        f"{BPB}::test_memory_shortage_halves_the_batch_and_changes_nothing")),
    "E3": Row("damaged checkpoints", "the newest good one, or exit 3", (
        f"{CHECKPOINT}::test_e03_every_damage_is_seen_and_the_older_one_taken",
        f"{CHECKPOINT}::test_e03_all_damaged_is_an_error_never_a_fresh_start",
        f"{DAMAGE}::test_b06_damage_is_refused_or_mended_and_never_read")),
    "E4": Row("wrong tokenizer, vocabulary, family, data", "exit 2, both fingerprints", (
        f"{CHECKPOINT}::test_e04_another_tokenizer_vocabulary_or_family_is_refused_with_both_values",
        f"{PRETRAIN}::test_e04_another_tokenizer_is_refused_with_both_fingerprints")),
    "E5": Row("another format version", "refused by number", (
        f"{CHECKPOINT}::test_e05_another_format_version_is_refused_by_number",)),
    "E6": Row("parameter mistakes", "all at once, exit 2", (
        f"{PARAMS}::test_all_errors_are_told_at_once",
        f"{PRETRAIN}::test_e06_mistakes_are_all_named_at_once_before_torch")),
    "E7": Row("parameters, code or formats changed in mid-run", "fresh folder, or a decision", (
        f"{STAGE}::test_work_of_another_manifest_version_is_left_beside_and_begun_anew",
        f"{PRETRAIN}::test_e07_a_changed_parameter_begins_beside_and_its_return_finds_the_old_model",
        f"{STAGE}::test_changed_code_under_unfinished_work_needs_a_decision")),
    "E8": Row("another stack", "continues, says which field", (
        f"{TRAINER}::test_e08_another_stack_continues_and_is_named",)),
    "E9": Row("a pickle under a weights name", "never unpickled", (
        f"{CHECKPOINT}::test_e09_a_pickle_under_a_weights_name_is_never_unpickled",)),
    "E10": Row("retention under a reader, or killed", "a sentence; two good remain", (
        f"{CHECKPOINT}::test_e10_a_reader_of_a_retired_checkpoint_gets_a_sentence",
        f"{CRASH}::test_e10_two_good_checkpoints_remain_wherever_retention_is_killed")),
    "E11": Row("the log after kills", "equal but for the clock", (
        f"{TWINS}::test_a08_twins_killed_at_random_moments_end_equal",
        f"{TWINS}::test_e11_the_log_after_kills_has_every_step_once")),
    "E12": Row("the loader at an epoch border", "+-1 defined", (
        f"{TRAINER}::test_e12_a_run_that_ends_beside_an_epoch_border_resumes_exactly",
        f"{LOADER}::test_an_epoch_may_end_exactly_with_a_step")),
    "F1": Row("kill during evaluation; NaN logits", "resumes; exit 3 with the place", (
        f"{BPB}::test_kill_at_any_block_continues_to_the_same_number",
        f"{BPB}::test_nonfinite_loss_names_document_and_position")),
    "F2": Row("untrained and uniform models", "closed form", (
        f"{BPB}::test_uniform_model_costs_log2_v_a_token",
        f"{BPB}::test_batch_budget_changes_nothing")),
    "F3": Row("two tokenizers, one text", "the same BPB", (
        f"{BPB}::test_two_tokenizers_give_one_number_where_bytes_cost_the_same",)),
    "F4": Row("a lossy tokenizer", "null with the reason", (
        f"{BPB}::test_lossy_tokenizer_gets_no_number",)),
    "F5": Row("export in a strange process", "same logits", (
        f"{HF}::test_a_strange_process_opens_it_without_this_project",
        f"{HF}::test_a_secret_or_a_path_stops_the_export")),
    "F6": Row("canary secrets", "in no output", (
        "tests/core/test_errors.py::test_f6_secrets_are_taken_out_of_every_message",
        f"{FINAL}::test_no_path_or_host_of_this_machine_is_in_it")),
}  # fmt: skip
CONTROLS = {
    "without random states": f"{CRASH}::test_control_without_the_random_states_the_bytes_differ",
    "step off by one": f"{CRASH}::test_control_with_the_step_off_by_one_the_bytes_differ",
    "without the checksum": f"{CRASH}::test_control_without_the_hash_a_flipped_bit_is_trained_on",
    "without fsync of folders":
        f"{F}test_power.py::test_control_without_the_fsync_of_folders_a_checkpoint_is_lost",
    "without fsync of files":
        f"{F}test_power.py::test_control_without_the_fsync_of_files_a_manifest_lies",
    "without the death signal":
        f"{CONCURRENT}::test_control_without_the_death_signal_the_stage_lives_on",
    "without a commit at every swap":
        f"{F}test_cvfp.py::test_control_without_a_commit_at_every_chunk_the_run_does_not_come_back",
    "a reader that lets its library's error out":
        f"{FUZZ}::test_control_a_reader_that_lets_its_librarys_error_out_is_caught",
    "a reader that believes a length":
        f"{FUZZ}::test_control_a_reader_that_believes_a_length_meets_the_limit",
    "skip what exists": f"{F}test_controls.py::test_a_writer_that_skips_existing_files_is_caught",
    "manifest first": f"{F}test_controls.py::test_a_manifest_written_first_is_caught",
}  # fmt: skip


WANTED = {"SIGKILL": 2_000, "damaged": 1_000}  # in one run: crash points, damaged files
Results = dict[str, Counter[str]]  # `file::test` -> how often it passed, failed, was skipped


def results_of(reports: list[Path]) -> Results:
    """How every test of some JUnit reports ended; parameters of one test are counted together."""
    found: Results = defaultdict(Counter)
    for report in reports:
        for case in ElementTree.parse(report).iter("testcase"):
            name = case.get("classname", "").replace(".", "/") + ".py"
            test = f"{name}::{case.get('name', '').partition('[')[0]}"
            bad = case.find("failure") is not None or case.find("error") is not None
            skipped = "skipped" if case.find("skipped") is not None else "passed"
            found[test]["failed" if bad else skipped] += 1
    return found


def reasons_of(reports: list[Path]) -> Counter[str]:
    """Why tests were skipped, and how many."""
    found = (skip for report in reports for skip in ElementTree.parse(report).iter("skipped"))
    return Counter(skip.get("message", "") for skip in found)


def moment_of(report: Path) -> str:
    """When a run was, how long it took, and on how many cores."""
    suite = next(ElementTree.parse(report).iter("testsuite"))
    minutes, seconds = divmod(round(float(suite.get("time", 0))), 60)
    day = suite.get("timestamp", "").partition("T")[0]
    return f"{day}, {minutes} min {seconds:02} s on {os.cpu_count()} cores"


def injected(counts: list[dict], what: str) -> int:
    """How many faults of a kind were counted."""
    return sum(c["count"] for c in counts if c["injected"].startswith(what))


def unproven(counts: list[dict], results: Results) -> list[str]:
    """Rows and controls of which some test failed or none passed, and numbers not reached."""
    every = {**{n: row.tests for n, row in ROWS.items()}, **{n: (t,) for n, t in CONTROLS.items()}}
    rows = [
        name
        for name, tests in every.items()
        if any(results[t]["failed"] for t in tests) or not any(results[t]["passed"] for t in tests)
    ]
    short = {what: injected(counts, what) for what in WANTED}
    return rows + [f"{what}: {n}, wanted {WANTED[what]}" for what, n in short.items()
                   if n < WANTED[what]]  # fmt: skip


def seen(name: str, counts: list[dict], results: Results) -> str:
    """What one row's tests did, then what they counted, by outcome."""
    total = sum((results[test] for test in ROWS[name].tests), Counter())
    ends = ", ".join(f"{total[end]} {end}" for end in ("passed", "failed", "skipped") if total[end])
    told = defaultdict(list)
    for c in sorted((c for c in counts if c["row"] == name), key=lambda c: c["injected"]):
        told[c["seen"]].append(f"{c['injected']}: {c['count']}")
    found = [f"{', '.join(each)}: {outcome}" for outcome, each in told.items()]
    return "; ".join([*([f"{ends} tests"] if ends else []), *found]) or "-"


def page(counts: list[dict], results: Results, reasons: Counter[str], moment: str) -> str:
    """docs/reliability.md."""
    failed = sum(ends["failed"] for ends in results.values())
    lines = [
        "# Reliability: the fault catalogue and what was seen",
        "",
        f"Written by `make faults`, {moment}. Each row: what is injected, what is promised, the "
        "tests that prove it, how they ended and what they counted. `-`: not run.",
        "",
        f"Crash points: **{injected(counts, 'SIGKILL'):,}**. Damaged files: "
        f"**{injected(counts, 'damaged'):,}**. Failing disks: {injected(counts, 'E'):,}; signals "
        f"that are handled: {injected(counts, 'SIG') - injected(counts, 'SIGKILL'):,}. Failed "
        f"tests: **{failed}**; a silently wrong result is one.",
        "",
        "A crash point is a process killed at one change of the file system, then the same command "
        "again, then every byte compared. Kills that leave the same bytes behind share one such "
        'command. "One in N": the trainer, the evaluation and the export are one code for all '
        "families, so `gpt` is killed at every change, the others at one in N, every family "
        "beginning with another one; second kills, errors and signals come more rarely.",
        "",
        "| row | injected | promise | tests | seen |",
        "|---|---|---|---|---|",
    ]
    for name, row in ROWS.items():
        tests = ", ".join(f"`{t.rpartition('::')[2]}`" for t in row.tests)
        gap = f" Not tested: {row.gap}." if row.gap else ""
        told = seen(name, counts, results)
        lines.append(f"| {name} | {row.inject} | {row.promise} | {tests} | {told}.{gap} |")
    lines += ["", "## Negative controls", "", "Each breaks one rule; the suite must turn red.", ""]
    for what, test in CONTROLS.items():
        red = "turned red" if results[test]["passed"] else "-"
        lines.append(f"- {what}: `{test.rpartition('::')[2]}`, {red}")
    if reasons:
        lines += ["", "## Skipped", ""]
        lines += [f"- {count} tests: {reason}" for reason, count in sorted(reasons.items())]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Print the tests, or write the page."""
    if len(sys.argv) == 1:
        tests = {t for row in ROWS.values() for t in row.tests} | set(CONTROLS.values())
        outside = sorted(t for t in tests if not t.startswith(F))
        # The longest first, or one core would wait for the other at the end.
        sys.stdout.write("\n".join([STAGES, DAMAGE, F, *outside]) + "\n")
        return 0
    counts, reports = tally.read(Path(sys.argv[1])), [Path(name) for name in sys.argv[2:]]
    results = results_of(reports)
    text = page(counts, results, reasons_of(reports), moment_of(reports[0]))
    (ROOT / "docs/reliability.md").write_text(text)
    bad = unproven(counts, results)
    sys.stderr.write("".join(f"error: not proven by this run: {name}\n" for name in bad))
    return int(bool(bad))


if __name__ == "__main__":
    raise SystemExit(main())
