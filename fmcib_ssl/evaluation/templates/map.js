"use strict";
// Maps of lesions: no network, no library. Points are drawn once; layout and colour only move and tint them.
for (const root of document.querySelectorAll(".map")) {
  const data = JSON.parse(root.querySelector("script").textContent);
  const svg = root.querySelector("svg"), tile = root.querySelector(".tile"), text = root.querySelector(".lesion p");
  const layout = root.querySelector(".layout"), column = root.querySelector(".column"), legend = root.querySelector(".legend");
  const width = 640, height = 460, margin = 16, edge = 192;
  let places = [], chosen = -1;
  const dots = data.tile_of.map(() => svg.appendChild(document.createElementNS("http://www.w3.org/2000/svg", "circle")));
  for (const dot of dots) dot.setAttribute("r", dots.length > 1000 ? 3 : 4.5);
  const fill = (select, names) => names.forEach(name => select.add(new Option(name, name)));
  fill(layout, Object.keys(data.layouts));
  fill(column, Object.keys(data.columns));
  layout.selectedIndex = layout.options.length - 1;
  if (data.tiles) {
    const scale = edge / data.tile_edge, rows = Math.ceil((Math.max(...data.tile_of) + 1) / data.num_across);
    tile.style.backgroundImage = `url(data:image/jpeg;base64,${data.tiles})`;
    tile.style.backgroundSize = `${data.num_across * edge}px ${rows * edge}px`;
  }
  function move() {
    const points = data.layouts[layout.value];
    const range = axis => { const v = points.map(p => p[axis]); return [Math.min(...v), Math.max(...v)]; };
    const [x0, x1] = range(0), [y0, y1] = range(1);
    places = points.map(([x, y]) => [
      margin + (width - 2 * margin) * (x - x0) / (x1 - x0 || 1),
      height - margin - (height - 2 * margin) * (y - y0) / (y1 - y0 || 1)]);
    dots.forEach((dot, i) => { dot.setAttribute("cx", places[i][0]); dot.setAttribute("cy", places[i][1]); });
  }
  function tint() {
    const own = data.columns[column.value];
    dots.forEach((dot, i) => dot.setAttribute("fill", own.colors[i]));
    legend.replaceChildren(...own.legend.map(([name, color]) => {
      const item = document.createElement("li");
      item.textContent = name;
      item.style.setProperty("--dot", color);
      return item;
    }));
  }
  function choose(i) {
    if (i < 0 || i === chosen) return;
    if (chosen >= 0) dots[chosen].classList.remove("chosen");
    dots[chosen = i].classList.add("chosen");
    svg.appendChild(dots[i]);  // above the others
    const k = data.tile_of[i], there = data.tiles && k >= 0;
    tile.style.width = tile.style.height = there ? `${edge}px` : "0";
    if (there) tile.style.backgroundPosition = `${-(k % data.num_across) * edge}px ${-Math.floor(k / data.num_across) * edge}px`;
    text.textContent = Object.entries(data.columns).map(([name, own]) => `${name}: ${own.values[i]}`).join("\n");
  }
  function nearest(x, y, reach, wanted = () => true) {
    let best = -1, least = reach * reach;
    places.forEach(([px, py], i) => {
      const distance = (px - x) ** 2 + (py - y) ** 2;
      if (distance < least && wanted(px - x, py - y, i)) { best = i; least = distance; }
    });
    return best;
  }
  const point = event => {
    const box = svg.getBoundingClientRect();
    choose(nearest((event.clientX - box.left) * width / box.width, (event.clientY - box.top) * height / box.height, 24));
  };
  svg.addEventListener("pointermove", point);
  svg.addEventListener("pointerdown", point);
  svg.addEventListener("keydown", event => {
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!step) return;
    event.preventDefault();
    const [x, y] = chosen < 0 ? [width / 2, height / 2] : places[chosen];
    const ahead = (dx, dy, i) => i !== chosen && dx * step[0] + dy * step[1] > Math.abs(dx * step[1]) + Math.abs(dy * step[0]);
    choose(nearest(x, y, Infinity, chosen < 0 ? undefined : ahead));
  });
  layout.addEventListener("change", move);
  column.addEventListener("change", tint);
  move();
  tint();
}
