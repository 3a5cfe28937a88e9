"""Two runs held against each other, and what the Prefect UI shows of it."""

from __future__ import annotations

from prefect import task
from prefect.artifacts import create_link_artifact, create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from segpipe.report.comparison import Comparison, compare_markdown
from segpipe.runs.compare import compare_runs
from segpipe_tasks.told import told


@task(name="compare runs", task_run_name="compare runs", cache_policy=NO_CACHE)
@told
def compare_two(before: str, after: str, out: str) -> Comparison:
    """Write table and page; publish headline and changes, and a link to the page where it has an address."""
    found = compare_runs(before, after, out)
    key = f"{found.after.job_name.lower().replace('_', '-').replace('.', '-')}-compare"
    told_of = f"{found.before.run_id} → {found.after.run_id}"
    create_markdown_artifact(compare_markdown(found), key=key, description=f"What changed, {told_of}")
    if found.page.startswith(("http://", "https://")):
        create_link_artifact(found.page, link_text="compare.html", key=f"{key}-page", description=told_of)
    return found
