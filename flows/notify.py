"""Tell people: a line in the log, an event in Prefect, and a webhook where there is one.

The webhook is a notification block of Prefect's (Slack, Teams, mail or any URL), named in
params.yaml under `notify.block`. This makes one for a URL of your own:

    python -m flows.notify --webhook https://example.org/hook

It gets a POST with JSON: `subject`, such as "grimace.promoted emotion", and `text`. Automations of
Prefect can act on the events `grimace.promoted`, `grimace.rejected`, `grimace.rolled_back` and
`grimace.failed` as well.
"""

import argparse
import logging
from typing import Any, Literal

from pipelines.cli import GrimaceError, run
from pipelines.params import load_params

# After the imports of ours, which set what Prefect reads from the environment.
from prefect import get_run_logger  # isort: skip
from prefect.blocks.abstract import NotificationBlock  # isort: skip
from prefect.blocks.core import Block  # isort: skip
from prefect.blocks.notifications import CustomWebhookNotificationBlock  # isort: skip
from prefect.client.schemas.objects import FlowRun  # isort: skip
from prefect.events import emit_event  # isort: skip
from prefect.exceptions import MissingContextError  # isort: skip
from prefect.flows import Flow  # isort: skip
from prefect.settings import PREFECT_API_URL  # isort: skip
from prefect.states import State  # isort: skip

What = Literal["promoted", "rejected", "rolled_back", "failed"]


def main() -> None:
    """Make the block, or try it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--webhook", metavar="URL", required=True, help="what is to be called")
    url = parser.parse_args().webhook
    if not PREFECT_API_URL.value():  # it would be saved where nobody looks
        raise GrimaceError(
            "PREFECT_API_URL is not set, and the block belongs to a server: start `python -m "
            "flows.up` and set it as that says"
        )
    kind, name = load_params().notify.block.split("/")
    if kind != CustomWebhookNotificationBlock.get_block_type_slug():
        raise GrimaceError(
            f"params.yaml: notify.block is {kind}/{name}; blocks of the type {kind} are made in "
            "Prefect's UI"
        )
    block = CustomWebhookNotificationBlock(
        name=name,
        url=url,
        headers=None,
        cookies=None,
        json_data={"subject": "{{subject}}", "text": "{{body}}"},
    )
    block.save(name, overwrite=True)
    print(f"saved as {kind}/{name}")


def tell(what: What, about: str, text: str) -> None:
    """Tell whoever listens; nobody who cannot be told stops the work.

    Args:
        what: happened.
        about: the task or the flow.
        text: what a person wants to know, a few lines.
    """
    log = _logger()
    level = logging.INFO if what in ("promoted", "rolled_back") else logging.WARNING
    log.log(level, "%s %s: %s", what.replace("_", " "), about, text)
    if not PREFECT_API_URL.value():  # it would start a server for it
        return
    emit_event(
        event=f"grimace.{what}",
        resource={"prefect.resource.id": f"grimace.{about}", "prefect.resource.name": about},
        payload={"text": text},
    )
    try:
        block = Block.load(load_params().notify.block)
        assert isinstance(block, NotificationBlock)
        block.notify(text, subject=f"grimace.{what} {about}")  # type: ignore[unused-coroutine]
    except Exception as error:  # what has happened has happened, whoever hears of it
        if "Unable to find block document" not in str(error):  # there need not be one
            log.warning("nobody could be notified: %s: %s", type(error).__name__, error)


def tell_failure(flow: Flow[Any, Any], flow_run: FlowRun, state: State[Any]) -> None:
    """A hook for `on_failure` and `on_crashed` of flows; tells the first line, the log has all."""
    if state.name == "Busy":  # another flow is at work; nothing is wrong
        return
    why = (state.message or state.name or "").partition("\n")[0]
    tell("failed", flow.name, f"{flow_run.name}: {why}")


def _logger() -> Any:
    try:
        return get_run_logger()
    except MissingContextError:  # in a hook there is no run any more
        return logging.getLogger("prefect.grimace")


if __name__ == "__main__":
    run(main)
