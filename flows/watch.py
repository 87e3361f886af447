"""The flow `glm-quant-watch`: has upstream moved? Then build from where it is now."""

from prefect import flow

from tasks.upstream import WatchSpec, look, propose, show_upstream


@flow(name="glm-quant-watch", flow_run_name="look upstream", persist_result=False)
def watch(spec: WatchSpec) -> None:
    """Look at every watched repository once; a repository that cannot be seen is left for later."""
    results = [look(place, deployment) for place, deployment in spec.pairs()]
    proposals = [propose(family, spec.repos()) for family in spec.families]
    show_upstream(results, proposals)
