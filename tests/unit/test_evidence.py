"""The tables of a run's page: the records' own figures, a column for each baseline."""

from tasks.evidence import divergence_table, evaluation_rows
from tests.card_records import M3, divergence_record, rich_evaluation


def test_divergence_is_told_by_slice_and_by_side_of_index_topk() -> None:
    """A build that is worse on one text, or behind the indexer, is seen to be."""
    record = divergence_record()
    rows = divergence_table(record)
    assert [(row["text"], row["at positions"]) for row in rows] == [
        (name, where)
        for name in ("all", "co~de")
        for where in ("all", "up to 2,048", "after 2,048")
    ]
    for row, measured in zip(rows, record.rows, strict=True):
        assert row["KL, mean"].startswith(f"{measured.mean_kl.value:.4f}")
        assert row["compared"] == f"{measured.positions:,}"
        assert row["perplexity"] != row["the source's"]


def test_evaluation_stands_beside_its_baselines() -> None:
    """What was measured of both, how, and no figure of another machine."""
    record = rich_evaluation(M3)
    names = [baseline.name for baseline in record.baselines]
    rows = {row["measured"]: row for row in evaluation_rows(record)}
    assert names
    assert all(set(row) == {"measured", "this build", "how", *names} for row in rows.values())
    needle = rows["Needle retrieval"]
    own = record.measurements.needle
    assert own is not None
    assert needle["this build"].startswith(f"{own.score * 100:.1f} %")
    memory = rows["Resident memory, at most"]
    assert memory["how"] == M3.describe()
    for baseline in record.baselines:
        same = baseline.measurements.machine == M3
        assert (memory[baseline.name] != "–") == same
