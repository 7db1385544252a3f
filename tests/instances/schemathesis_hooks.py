"""Keeps the run from cutting itself off: nothing is forced. What a change could cut off is refused then."""

import schemathesis


@schemathesis.hook
def before_call(context, case, kwargs):
    forced = (case.query or {}).get("force")
    if str(forced).lower() == "true":
        case.query["force"] = "false"
