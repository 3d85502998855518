"""The Grafana dashboard, generated from the table of panels.

Built with Grafana's own typed builders, for its dashboard schema of version 11; newer ones read it.
"""

from __future__ import annotations

from string import ascii_uppercase

from deploy.monitoring.panels import NAMESPACE, PODS, ROWS, Graph
from grafana_foundation_sdk.builders import dashboard as grafana
from grafana_foundation_sdk.builders.common import StackingConfig, VizLegendOptions
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.builders.stat import Panel as StatPanel
from grafana_foundation_sdk.builders.timeseries import Panel as TimeSeriesPanel
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import (
    LegendDisplayMode,
    LegendPlacement,
    StackingMode,
)
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DataSourceRef,
    VariableOption,
    VariableRefresh,
)

_SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")


def document() -> str:
    """Return the dashboard as Grafana imports it."""
    builder = (
        grafana.Dashboard("els-denoise")
        .uid("els-denoise")
        .description("Generated: see deploy/monitoring in the repository of els-denoise.")
        .tags(["els-denoise", "grpc"])
        .time("now-3h", "now")
        .refresh("30s")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .with_variable(grafana.DatasourceVariable("datasource").label("Source").type("prometheus"))
        .with_variable(_variable("namespace", "els_build_info"))
        .with_variable(_variable("pod", f"els_build_info{{{NAMESPACE}}}"))
        # The label of calls that name no model is empty, so "all" is more than the listed models.
        .with_variable(_variable("model", f"els_model_refused{{{PODS}}}").all_value(".*"))
    )
    for title, graphs in ROWS:
        builder.with_row(grafana.Row(title))
        for graph in graphs:
            builder.with_panel(_panel(graph))
    built = builder.build()
    for number, panel in enumerate(built.panels or [], start=1):
        panel.id_val = number
    return JSONEncoder(sort_keys=True, indent=2).encode(built) + "\n"


def _variable(name: str, series: str) -> grafana.QueryVariable:
    return (
        grafana.QueryVariable(name)
        .label(name.title())
        .datasource(_SOURCE)
        .query(f"label_values({series}, {name})")
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .multi(True)
        .include_all(True)
        .current(VariableOption(text="All", value="$__all"))
    )


def _panel(graph: Graph) -> StatPanel | TimeSeriesPanel:
    panel = StatPanel().height(4) if graph.single else _lines(stacked=graph.stacked)
    panel.span(graph.width).title(graph.title).description(graph.text).unit(graph.unit).datasource(
        _SOURCE
    )
    for reference, (legend, expression) in zip(ascii_uppercase, graph.queries, strict=False):
        panel.with_target(
            Dataquery()
            .datasource(_SOURCE)
            .ref_id(reference)
            .expr(expression)
            .legend_format(legend)
            # With traces on, a dot links a slow call to its trace.
            .exemplar("els_request_seconds_bucket" in expression)
        )
    return panel


def _lines(*, stacked: bool) -> TimeSeriesPanel:
    legend = (
        VizLegendOptions()
        .show_legend(True)
        .display_mode(LegendDisplayMode.TABLE)
        .placement(LegendPlacement.BOTTOM)
        .calcs(["lastNotNull", "max"])
    )
    panel = TimeSeriesPanel().height(8).legend(legend).min(0)
    if stacked:
        panel.stacking(StackingConfig().mode(StackingMode.NORMAL)).fill_opacity(30)
    return panel
