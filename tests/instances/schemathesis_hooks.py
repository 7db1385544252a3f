"""Keeps the run from cutting itself off: nothing is forced, and no spec is put on trial. What a change could cut
off is refused then."""

import re

import schemathesis


@schemathesis.hook
def before_call(context, case, kwargs):
    query = case.query or {}
    if str(query.get("force")).lower() == "true":
        query["force"] = "false"
    on_trial = re.fullmatch(r"[0-9]+s", str(query.get("confirm")))
    if case.operation.path == "/v1/spec" and on_trial:
        del query["confirm"]
