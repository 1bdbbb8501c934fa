// Keeps the state of every run from the patches that the server streams, and shows one of them.
// All text comes from outside: it is set as text, never as HTML.

import { Chart } from "/chart.js";

const $ = (id) => document.getElementById(id);
const runs = new Map();
let shown = null, isPinned = false, isDirty = false;

const chart = new Chart($("loss"), $("tip"));

// ---- state ----

function apply(patch) {
  if (patch.runs !== undefined) return runs.clear();
  if (patch.reset || !runs.has(patch.run)) {
    runs.set(patch.run, { status: {}, stage: null, curve: [], evals: [], scores: [], pictures: [], log: [] });
  }
  const run = runs.get(patch.run);
  for (const key of ["curve", "evals", "scores", "pictures", "log"]) if (patch[key]) run[key].push(...patch[key]);
  if (run.curve.length > 20000) run.curve = run.curve.filter((_, index) => index % 2 === 0);
  if (patch.status) Object.assign(run.status, patch.status);
  if (patch.stage !== undefined) run.stage = patch.stage;
  if (!isPinned || !runs.has(shown)) shown = patch.run;
  isDirty = true;
}

function listen() {
  const stream = new EventSource("/stream");
  stream.onopen = () => connected(true);
  stream.onmessage = (message) => JSON.parse(message.data).forEach(apply);
  stream.onerror = () => {
    connected(false);
    if (stream.readyState === EventSource.CLOSED) setTimeout(listen, 2000);
  };
}

function connected(isOn) {
  $("link").dataset.on = isOn ? "yes" : "no";
  $("link").lastElementChild.textContent = isOn ? "live" : "connection lost";
}

// Patches may come faster than anybody can look: the page is updated at most once a frame.
function frame() {
  if (isDirty) { isDirty = false; show(); }
  requestAnimationFrame(frame);
}

// ---- the page ----

function show() {
  const run = runs.get(shown);
  for (const part of document.querySelectorAll(".hero, .columns")) part.hidden = !run;
  $("welcome").hidden = Boolean(run);
  if (!run) return;
  showHead(run);
  showStage(run.stage);
  showTiles(run);
  chart.set(shown, run.curve);
  $("eval-key").hidden = !run.evals.length;
  $("base-key").hidden = run.evals.length < 2 || !run.evals.some((row) => Number.isFinite(row[2]));
  $("prior-key").hidden = !run.curve.some((row) => row[4]);
  showDetails(run.status);
  showGenerating(run);
  showGallery(run);
  showLog(run.log);
}

function showHead(run) {
  const { status = "waiting", step = 0, total_steps: total = 0, eta_seconds: left } = run.status;
  $("run").textContent = shown;
  document.title = status === "running" && total ? `${Math.floor((100 * step) / total)} % · ${shown}` : `${status} · ${shown}`;
  $("state").textContent = status;
  $("state").dataset.state = status;
  $("step").textContent = step.toLocaleString("en");
  $("total").textContent = total.toLocaleString("en");
  $("progress").style.width = `${total ? (100 * step) / total : 0}%`;
  $("eta").textContent = status === "running" && left !== undefined ? `${duration(left)} left` : "";
  $("runs").hidden = runs.size < 2;
  if ($("runs").options.length !== runs.size) {
    $("runs").replaceChildren(...[...runs.keys()].map((name) => new Option(name, name)));
  }
  $("runs").value = shown;
}

function showStage(stage) {
  $("stage").hidden = !stage;
  if (!stage) return;
  const { current = 0, total } = stage.progress ?? {};
  $("stage-name").textContent = stage.label;
  $("stage-count").textContent = total ? `${current} of ${total}` : current || "";
  $("stage-progress").parentElement.hidden = !total;
  $("stage-progress").style.width = `${total ? (100 * current) / total : 0}%`;
}

function showTiles(run) {
  const { status, curve, evals, scores } = run, recent = curve.filter((row) => !row[4]).slice(-20).map((row) => row[1]).filter(Number.isFinite);
  const mean = recent.length ? recent.reduce((sum, each) => sum + each, 0) / recent.length : status.loss;
  const losses = evals.map((row) => row[1]).filter(Number.isFinite);
  const tiles = [
    ["loss", number(mean), recent.length > 1 ? `last ${recent.length}` : ""],
    ["eval loss", number(losses.at(-1)), losses.length > 1 ? `best ${number(Math.min(...losses))}` : ""],
    ["learning rate", rate(status.learning_rate), ""],
    ["gradient norm", number(status.grad_norm, 3), ""],
    ["seconds per step", status.status === "running" ? number(status.seconds, 3) : undefined, ""],
    ["epoch", status.epoch, ""],
    ["memory", status.memory_gb ? `${status.memory_gb.toFixed(1)} GB` : undefined, ""],
    ...(scores.length ? [[`${scores.at(-1).metric} score`, number(scores.at(-1).mean), `step ${scores.at(-1).step}`]] : []),
  ].filter(([, value]) => value !== undefined && value !== "");
  $("tiles").replaceChildren(...tiles.map(([name, value, note]) => {
    const shownValue = element("dd", { textContent: value });
    if (note) shownValue.append(element("small", { textContent: note }));
    return element("div", {}, element("dt", { textContent: name }), shownValue);
  }));
}

function showDetails(status) {
  const facts = { ...status.details };
  if (status.output_dir) facts.output = status.output_dir;
  for (const [name, path] of Object.entries(status.outputs ?? {})) facts[name] = path;
  $("details").replaceChildren(...Object.entries(facts).flatMap(([name, text]) => [
    element("dt", { textContent: name }), element("dd", { textContent: text }),
  ]));
  $("commands").hidden = !status.commands?.length;
  $("commands").lastElementChild.textContent = (status.commands ?? []).join("\n");
}

// ---- images ----

const keyOf = (image) => `${image.shortname}|${image.resolution}|${image.index ?? 0}|${image.kind}`;
const isPreview = (image) => image.step_label !== undefined;

// The latest preview of each image that is being generated; removed when the image itself is there.
function showGenerating(run) {
  const previews = run.pictures.filter(isPreview), step = previews.at(-1)?.step;
  const done = new Set(run.pictures.filter((each) => !isPreview(each)).map((each) => `${each.step}|${keyOf(each)}`));
  const latest = new Map();
  for (const each of previews) if (each.step === step && !done.has(`${step}|${keyOf(each)}`)) latest.set(keyOf(each), each);
  const isOver = run.status.status !== "running" || !latest.size;
  $("generating-card").hidden = isOver;
  if (isOver) return $("generating").replaceChildren();
  $("generating-step").textContent = `step ${step}`;
  keyed($("generating"), [...latest.entries()], (figure, image) => {
    figure.bar.style.width = `${(100 * image.sampling_step) / image.num_sampling_steps}%`;
    figure.label.textContent = image.step_label;
  }, (image) => {
    const figure = thumbnail(image, image.shortname, image.step_label);
    figure.bar = element("div");
    figure.label = figure.querySelector("figcaption span:last-child");
    figure.insertBefore(element("div", { className: "progress" }, figure.bar), figure.lastChild);
    return figure;
  });
}

function showGallery(run) {
  const finished = run.pictures.filter((each) => !isPreview(each) && each.kind !== "grid");
  $("gallery-card").hidden = !finished.length;
  const rows = new Map();
  for (const image of finished) {
    const name = `${image.shortname}|${image.resolution}|${image.index ?? 0}`;
    if (!rows.has(name)) rows.set(name, new Map());
    rows.get(name).set(`${image.step}|${image.kind}`, image);
  }
  $("gallery-count").textContent = `${counted(finished.length, "image")}, ${counted(rows.size, "prompt")}`;
  keyed($("gallery"), [...rows.entries()], updateRow, makeRow);
}

function makeRow(images) {
  const [first] = images.values(), row = element("section");
  row.strip = element("div", { className: "row" });
  const title = element("div", { className: "prompt" }, element("b", { textContent: first.shortname + (first.index ? `, no. ${first.index + 1}` : "") }), element("span", { textContent: first.prompt }));
  row.append(title, row.strip);
  return row;
}

function updateRow(row, images) {
  const rank = { base: 0, live: 1, ema: 2 };
  const order = [...images.entries()].sort(([, a], [, b]) =>
    (a.kind !== "base") - (b.kind !== "base") || a.step - b.step || rank[a.kind] - rank[b.kind]);
  const isAtEnd = row.strip.scrollLeft + row.strip.clientWidth >= row.strip.scrollWidth - 40;
  const before = row.strip.children.length;
  keyed(row.strip, order, () => {}, (image) => {
    const when = image.kind === "base" ? "base model" : `step ${image.step}`;
    return thumbnail(image, when, image.kind === "ema" ? "EMA" : "");
  });
  [...row.strip.children].forEach((figure, index) => figure.classList.toggle("newest", index === order.length - 1));
  if (row.strip.children.length > before && isAtEnd) row.strip.scrollLeft = row.strip.scrollWidth;
}

function thumbnail(image, left, right) {
  const img = element("img", { src: `/pictures/${image.image}`, alt: image.prompt || image.shortname, loading: "lazy" });
  img.style.setProperty("--ratio", `${image.width} / ${image.height}`);
  const caption = element("figcaption", {}, element("span", { textContent: left }), element("span", { textContent: right }));
  const figure = element("figure", {}, img, caption);
  img.addEventListener("click", () => view(figure.image));
  img.addEventListener("error", () => figure.remove());
  return figure;
}

// Children of `parent` by key: kept where they are, changed or made; images do not flicker.
function keyed(parent, entries, update, make) {
  const old = new Map([...parent.children].map((child) => [child.dataset.key, child]));
  entries.forEach(([key, item], index) => {
    let child = old.get(key);
    if (!child) { child = make(item); child.dataset.key = key; }
    old.delete(key);
    // In place first: what is nowhere has no width, and cannot be scrolled.
    if (parent.children[index] !== child) parent.insertBefore(child, parent.children[index] ?? null);
    if (child.image !== item) {
      child.image = item;
      if (child.tagName === "FIGURE") child.querySelector("img").src = `/pictures/${item.image}`;
      update(child, item);
    }
  });
  for (const child of old.values()) child.remove();
}

// ---- one image, large ----

let viewed = null;

function view(image) {
  viewed = image;
  const previews = runs.get(shown).pictures.filter((each) => isPreview(each) && each.step === image.step && keyOf(each) === keyOf(image));
  const label = isPreview(image) ? `, sampling step ${image.step_label}` : image.kind === "ema" ? ", EMA" : "";
  $("viewer-image").src = `/pictures/${image.image}`;
  $("viewer-title").textContent = `${image.shortname} · ${image.kind === "base" ? "base model" : `step ${image.step}`}${label} · ${image.resolution}`;
  $("viewer-prompt").textContent = image.prompt;
  $("viewer-strip").replaceChildren(...previews.map((each) => {
    const img = element("img", { src: `/pictures/${each.image}`, alt: each.step_label, title: each.step_label });
    img.addEventListener("click", () => { $("viewer-image").src = img.src; });
    return img;
  }));
  if (!$("viewer").open) $("viewer").showModal();
}

function turn(by) {
  const row = [...document.querySelectorAll("#gallery .row")].find((each) => [...each.children].some((figure) => figure.image === viewed));
  const images = row ? [...row.children].map((figure) => figure.image) : [];
  const next = images[images.indexOf(viewed) + by];
  if (next) view(next);
}

// ---- log ----

function showLog(lines) {
  const list = $("log"), kept = list.children.length && list.run === shown && list.count <= lines.length ? list.count : 0;
  if (!kept) list.replaceChildren();
  for (const line of lines.slice(kept)) {
    const time = new Date(line.timestamp), title = line.title === line.severity ? line.message : line.title;
    const item = element("li", {},
      element("time", { textContent: isNaN(time) ? "" : time.toLocaleTimeString("en-GB") }), element("b", { textContent: title }));
    if (line.message && title !== line.message) item.append(element("p", { textContent: line.message }));
    item.dataset.severity = line.severity;
    list.prepend(item);
  }
  list.run = shown;
  list.count = lines.length;
  while (list.children.length > 500) list.lastChild.remove();
}

// ---- words and elements ----

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function number(value, digits = 4) {
  if (typeof value !== "number") return value ?? undefined;
  return value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e5) ? value.toExponential(2) : Number(value.toPrecision(digits)).toString();
}

const counted = (count, what) => `${count} ${what}${count === 1 ? "" : "s"}`;

const rate = (value) => (typeof value === "number" ? value.toExponential(2).replace(/\.?0*e/, "e") : undefined);

function duration(seconds) {
  if (seconds < 60) return `${Math.round(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 60 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${String(minutes % 60).padStart(2, "0")} min`;
}

// ---- start ----

const wanted = localStorage.getItem("theme") ?? (matchMedia("(prefers-color-scheme: light)").matches ? "light" : "dark");
document.documentElement.dataset.theme = wanted;
$("theme").addEventListener("click", () => {
  const theme = document.documentElement.dataset.theme === "light" ? "dark" : "light";
  document.documentElement.dataset.theme = theme;
  localStorage.setItem("theme", theme);
});
$("runs").addEventListener("change", (event) => { shown = event.target.value; isPinned = true; isDirty = true; });
$("log-scale").addEventListener("click", () => {
  chart.isLog = !chart.isLog;
  $("log-scale").setAttribute("aria-pressed", String(chart.isLog));
  chart.draw();
});
$("viewer").addEventListener("click", (event) => { if (event.target === $("viewer")) $("viewer").close(); });
document.querySelector("dialog .close").addEventListener("click", () => $("viewer").close());
document.querySelector("dialog .previous").addEventListener("click", () => turn(-1));
document.querySelector("dialog .next").addEventListener("click", () => turn(1));
document.addEventListener("keydown", (event) => {
  if (!$("viewer").open) return;
  if (event.key === "ArrowLeft") turn(-1);
  if (event.key === "ArrowRight") turn(1);
});
$("hint").textContent = `"webhook_config": {\n  "webhook_type": "raw",\n  "callback_url": "${location.origin}/"\n}`;
listen();
requestAnimationFrame(frame);
