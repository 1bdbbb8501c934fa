// The loss curve on a canvas: every step faintly, its smoothed course, and the eval loss, which is the one to trust.

const LEFT = 54, RIGHT = 12, TOP = 12, BOTTOM = 26;

export class Chart {
  constructor(canvas, tip) {
    this.canvas = canvas;
    this.tip = tip;
    this.rows = [];
    this.prior = [];
    this.smoothPrior = [];
    this.evals = [];
    this.isLog = false;
    this.total = 0;
    this.hover = null;
    new ResizeObserver(() => this.draw()).observe(canvas);
    canvas.addEventListener("pointermove", (event) => this.point(event.offsetX));
    canvas.addEventListener("pointerleave", () => this.point(null));
  }

  set(rows, evals, total) {
    const known = rows.filter((row) => Number.isFinite(row[1]));
    this.rows = known.filter((row) => !row[4]);
    // Steps on regularisation data alone: their loss is the distance from the base model, another kind of number.
    this.prior = known.filter((row) => row[4]);
    this.smoothPrior = smoothed(this.prior);
    this.evals = evals.filter((row) => Number.isFinite(row[1]));
    this.smooth = smoothed(this.rows);
    this.total = total || 0;
    const last = this.smooth.at(-1);
    const text = last === undefined ? "no points" : `${known.length} points, at last ${last.toPrecision(4)}`;
    this.canvas.setAttribute("aria-label", `loss curve, ${text}`);
    this.draw();
  }

  draw() {
    const { clientWidth: width, clientHeight: height } = this.canvas;
    if (!width || !height) return;
    const scale = window.devicePixelRatio || 1;
    this.canvas.width = width * scale;
    this.canvas.height = height * scale;
    const pen = this.canvas.getContext("2d");
    pen.scale(scale, scale);
    pen.clearRect(0, 0, width, height);
    const colour = (name) => getComputedStyle(this.canvas).getPropertyValue(`--${name}`).trim();
    pen.font = "12px system-ui, sans-serif";
    if (this.rows.length + this.prior.length + this.evals.length < 1) {
      pen.fillStyle = colour("muted");
      pen.textAlign = "center";
      pen.fillText("the curve begins with the first step", width / 2, height / 2);
      return;
    }
    this.scales(width, height);
    this.grid(pen, colour, width, height);
    pen.save();
    pen.beginPath();
    pen.rect(LEFT, TOP - 4, width - LEFT - RIGHT + 4, height - TOP - BOTTOM + 8);
    pen.clip();
    this.path(pen, this.rows.map((row) => [row[0], row[1]]), colour("raw"), 1);
    this.area(pen, this.rows.map((row, index) => [row[0], this.smooth[index]]), colour("accent"), height);
    this.path(pen, this.rows.map((row, index) => [row[0], this.smooth[index]]), colour("accent"), 2.2);
    this.path(pen, this.prior.map((row, index) => [row[0], this.smoothPrior[index]]), colour("prior"), 1.8);
    const base = this.evals.findLast((row) => Number.isFinite(row[2]))?.[2];
    if (base !== undefined) this.level(pen, base, colour("eval"), width);
    this.path(pen, this.evals, colour("eval"), 2);
    for (const [step, loss] of this.evals) this.dot(pen, step, loss, colour("eval"), 3.5, colour("card"));
    pen.restore();
    if (this.hover !== null) this.cross(pen, colour, height);
  }

  scales(width, height) {
    const steps = [...this.rows, ...this.evals].map((row) => row[0]);
    const first = Math.min(0, ...steps.slice(0, 1));
    const last = Math.max(...[this.rows, this.prior, this.evals].map((each) => each.at(-1)?.[0] ?? 0), 1);
    // A single wild step would flatten the curve: its peak may leave the picture.
    const sorted = this.rows.map((row) => row[1]).sort((a, b) => a - b);
    const at = (share) => sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))];
    const marks = [...this.smooth, ...this.smoothPrior, ...this.evals.flatMap((row) => [row[1], row[2]]).filter(Number.isFinite), ...(sorted.length ? [at(0.01), at(0.985)] : [])];
    let low = Math.min(...thin(marks)), high = Math.max(...thin(marks));
    const turn = (value) => (this.isLog ? Math.log10(Math.max(value, 1e-8)) : value);
    low = turn(low); high = turn(high);
    const room = (high - low || Math.abs(high) || 1) * 0.07;
    low -= room; high += room;
    if (!this.isLog && low < 0 && Math.min(...thin(marks)) >= 0) low = 0;
    this.low = low; this.high = high; this.last = last; this.turn = turn;
    this.x = (step) => LEFT + ((step - first) / (last - first || 1)) * (width - LEFT - RIGHT);
    this.y = (value) => TOP + (1 - (turn(value) - low) / (high - low)) * (height - TOP - BOTTOM);
    this.step = (x) => first + ((x - LEFT) / (width - LEFT - RIGHT)) * (last - first);
  }

  grid(pen, colour, width, height) {
    pen.strokeStyle = colour("line");
    pen.fillStyle = colour("muted");
    pen.lineWidth = 1;
    pen.textAlign = "right";
    pen.textBaseline = "middle";
    for (const value of ticks(this.low, this.high, 6)) {
      const shown = this.isLog ? 10 ** value : value, y = Math.round(this.y(shown)) + 0.5;
      pen.beginPath(); pen.moveTo(LEFT, y); pen.lineTo(width - RIGHT, y); pen.stroke();
      pen.fillText(Number(shown.toPrecision(3)).toString(), LEFT - 8, y);
    }
    pen.textAlign = "center";
    pen.textBaseline = "top";
    for (const value of ticks(0, this.last, Math.max(2, Math.floor(width / 120)))) {
      if (Number.isInteger(value)) pen.fillText(value.toLocaleString("en"), Math.max(this.x(value), LEFT + 6), height - BOTTOM + 8);
    }
  }

  path(pen, points, colour, width) {
    pen.strokeStyle = colour; pen.lineWidth = width; pen.lineJoin = "round";
    pen.beginPath();
    points.forEach(([step, value], index) => pen[index ? "lineTo" : "moveTo"](this.x(step), this.y(value)));
    pen.stroke();
  }

  area(pen, points, colour, height) {
    if (points.length < 2) return;
    const fill = pen.createLinearGradient(0, TOP, 0, height - BOTTOM);
    fill.addColorStop(0, `${colour}2e`); fill.addColorStop(1, `${colour}00`);
    pen.fillStyle = fill;
    pen.beginPath();
    points.forEach(([step, value], index) => pen[index ? "lineTo" : "moveTo"](this.x(step), this.y(value)));
    pen.lineTo(this.x(points.at(-1)[0]), height - BOTTOM); pen.lineTo(this.x(points[0][0]), height - BOTTOM);
    pen.fill();
  }

  // The eval loss of the untouched base model: what the run has to stay below.
  level(pen, value, colour, width) {
    const y = this.y(value);
    pen.strokeStyle = colour; pen.lineWidth = 1.2; pen.setLineDash([2, 4]);
    pen.beginPath(); pen.moveTo(LEFT, y); pen.lineTo(width - RIGHT, y); pen.stroke();
    pen.setLineDash([]);
    pen.fillStyle = colour; pen.textAlign = "right"; pen.textBaseline = "bottom";
    pen.fillText("base model", width - RIGHT - 4, y - 3);
  }

  dot(pen, step, value, colour, radius, ring) {
    pen.beginPath(); pen.arc(this.x(step), this.y(value), radius, 0, 7);
    pen.fillStyle = colour; pen.fill();
    pen.lineWidth = 1.5; pen.strokeStyle = ring; pen.stroke();
  }

  point(x) {
    this.hover = x === null || !this.rows.length ? null : nearest(this.rows, this.step(x));
    this.draw();
    this.tip.hidden = this.hover === null;
    if (this.hover === null) return;
    const [step, loss, rate, norm] = this.rows[this.hover], at = this.x(step);
    const lines = [`step ${step}`, `loss ${loss.toPrecision(4)}`, `smoothed ${this.smooth[this.hover].toPrecision(4)}`];
    if (Number.isFinite(rate)) lines.push(`rate ${rate.toExponential(2)}`);
    if (Number.isFinite(norm)) lines.push(`gradient ${norm.toPrecision(3)}`);
    this.tip.textContent = lines.join("\n");
    const isRight = at > this.canvas.clientWidth / 2;
    this.tip.style.left = isRight ? "auto" : `${at + 14}px`;
    this.tip.style.right = isRight ? `${this.canvas.clientWidth - at + 14}px` : "auto";
  }

  cross(pen, colour, height) {
    const step = this.rows[this.hover][0], x = Math.round(this.x(step)) + 0.5;
    pen.strokeStyle = colour("muted"); pen.lineWidth = 1; pen.setLineDash([3, 3]);
    pen.beginPath(); pen.moveTo(x, TOP); pen.lineTo(x, height - BOTTOM); pen.stroke();
    pen.setLineDash([]);
    this.dot(pen, step, this.smooth[this.hover], colour("accent"), 4.5, colour("card"));
  }
}

// Exponential smoothing that starts at the first value's weight, over about a fortieth of the run.
function smoothed(rows) {
  const keep = 1 - 1 / Math.min(Math.max(rows.length / 40, 3), 120);
  let sum = 0, weight = 0;
  return rows.map((row) => {
    sum = sum * keep + row[1]; weight = weight * keep + 1;
    return sum / weight;
  });
}

// Math.min(...values) has a limit on how many it takes.
function thin(values) {
  const every = Math.ceil(values.length / 5000);
  return every > 1 ? values.filter((_, index) => index % every === 0) : values;
}

function ticks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const size = [1, 2, 2.5, 5, 10].find((each) => each * power >= rough) * power, found = [];
  for (let value = Math.ceil(low / size) * size; value <= high + size * 1e-6; value += size) found.push(Number(value.toPrecision(10)));
  return found;
}

function nearest(rows, step) {
  let low = 0, high = rows.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (rows[middle][0] < step) low = middle + 1; else high = middle;
  }
  return low && step - rows[low - 1][0] < rows[low][0] - step ? low - 1 : low;
}
