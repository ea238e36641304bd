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

// A click on a heading sorts by its column: numbers by value, what has none last; again the other way.
for (const table of document.querySelectorAll("table.sorts")) {
  const body = table.tBodies[0];
  for (const [column, heading] of [...table.tHead.rows[0].cells].entries()) {
    const button = document.createElement("button");
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      const rising = heading.getAttribute("aria-sort") !== "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", rising ? "ascending" : "descending");
      const text = (row) => [...row.cells[column].childNodes]
        .filter((node) => node.nodeName !== "SMALL").map((node) => node.textContent).join("").trim();
      const value = (row) => parseFloat(text(row).replace("−", "-").replaceAll(",", ""));
      const compare = (a, b) => {
        const [x, y] = [value(a), value(b)];
        if (heading.classList.contains("n") && (isNaN(x) || isNaN(y))) return isNaN(x) - isNaN(y);
        const order = heading.classList.contains("n") ? x - y : text(a).localeCompare(text(b), undefined, { numeric: true });
        return rising ? order : -order;
      };
      body.append(...[...body.rows].sort(compare));
    });
  }
}
