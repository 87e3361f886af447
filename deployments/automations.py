"""What the server does by itself: mark runs that went silent, when no worker is left to tell.

The automation is made once by name; what a person changed in the UI afterwards (or switched off)
stays.
"""

from datetime import timedelta

from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification
from prefect.settings import get_current_settings

# A heartbeat thread that waits behind a busy machine is late, not dead: five in a row must miss.
_MISSED_HEARTBEATS = 5


def silent_runs(within: timedelta) -> AutomationCore:
    """Return the automation that marks a run Crashed when nothing was heard of it for so long."""
    return AutomationCore(
        name="glm-quant: mark silent runs",
        description="A run without a heartbeat is dead: its machine lost power, or its worker.",
        trigger=EventTrigger(
            after={"prefect.flow-run.heartbeat"},
            expect={"prefect.flow-run.*"},
            match=ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*"]}),
            match_related=tagged("glm-quant"),
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=within,
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.CRASHED,
                name="Crashed",
                message=f"Nothing was heard of the run for {within.total_seconds():.0f} s.",
                force=False,
            )
        ],
    )


def tagged(tag: str) -> ResourceSpecification:
    """Return what matches events of runs with a tag, their deployment's included."""
    return ResourceSpecification(
        {"prefect.resource.id": [f"prefect.tag.{tag}"], "prefect.resource.role": ["tag"]}
    )


def install_automation() -> None:
    """Make the automation if it is missing."""
    frequency = get_current_settings().flows.heartbeat_frequency or 60
    automation = silent_runs(timedelta(seconds=_MISSED_HEARTBEATS * frequency))
    with get_client(sync_client=True) as client:
        if not client.read_automations_by_name(automation.name):
            client.create_automation(automation)
