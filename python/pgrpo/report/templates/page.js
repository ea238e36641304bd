"use strict";
const figures = JSON.parse(document.getElementById("figures").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");

function draw() {
  const css = getComputedStyle(document.documentElement);
  const color = (name) => css.getPropertyValue(name).trim();
  const axis = {
    gridcolor: color("--grid"), linecolor: color("--rule"), tickcolor: color("--rule"),
    showline: true, ticks: "outside", ticklen: 4, fixedrange: true,
    title: { font: { size: 12 }, standoff: 8 },
  };
  const template = { layout: {
    font: { color: color("--quiet"), size: 12, family: getComputedStyle(document.body).fontFamily },
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    hoverlabel: { bgcolor: color("--card"), bordercolor: color("--rule"), font: { color: color("--ink") } },
    xaxis: axis, yaxis: { ...axis, showline: false, ticks: "" },
  } };
  for (const [id, figure] of Object.entries(figures)) {
    Plotly.react(id, figure.data, { ...figure.layout, template },
      { displayModeBar: false, responsive: true });
  }
}

draw();
dark.addEventListener("change", draw);
