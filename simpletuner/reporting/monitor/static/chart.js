// The loss chart: the server makes the chart (the same as in the report); this file loads it and shows values.

const MIN_PAUSE = 500; // milliseconds between two charts of a running run

export class Chart {
  constructor(place, tip) {
    Object.assign(this, { place, tip, rows: [], run: null, isLog: false, isStale: false, isLoading: false });
    new ResizeObserver(() => this.draw()).observe(place);
    place.addEventListener("pointermove", (event) => this.point(event));
    place.addEventListener("pointerleave", () => { tip.hidden = true; this.cross.remove(); });
    this.cross = document.createElementNS("http://www.w3.org/2000/svg", "line");
    this.cross.setAttribute("class", "cross");
  }

  set(run, rows) {
    this.run = run;
    this.rows = rows.filter((row) => Number.isFinite(row[1]));
    const last = this.rows.filter((row) => !row[4]).at(-1)?.[1];
    const text = this.rows.length ? `${this.rows.length} points${last === undefined ? "" : `, last ${last.toPrecision(4)}`}` : "no points";
    this.place.setAttribute("aria-label", `loss curve, ${text}`);
    this.draw();
  }

  async draw() {
    this.isStale = true;
    if (this.isLoading || this.run === null) return;
    this.isLoading = true;
    while (this.isStale) {
      this.isStale = false;
      const { clientWidth: width, clientHeight: height } = this.place, run = this.run;
      const question = new URLSearchParams({ run, width, height, log: Number(this.isLog) });
      const answer = width && height ? await fetch(`/chart?${question}`).catch(() => null) : null;
      const text = answer?.ok ? await answer.text() : "";
      // Parsed as a document of its own: nothing in it runs.
      if (text && run === this.run) this.place.replaceChildren(new DOMParser().parseFromString(text, "image/svg+xml").documentElement);
      else if (answer?.ok) this.place.replaceChildren("The curve begins with the first step.");
      await new Promise((done) => setTimeout(done, MIN_PAUSE));
    }
    this.isLoading = false;
  }

  // The values of the step under the pointer.
  point(event) {
    const svg = this.place.querySelector("svg"), rows = this.rows.filter((row) => !row[4]);
    this.tip.hidden = !svg || !rows.length;
    if (this.tip.hidden) return;
    const { left, right, first, last } = Object.fromEntries(Object.entries(svg.dataset).map(([key, value]) => [key, Number(value)]));
    const box = this.place.getBoundingClientRect();
    const wanted = first + ((event.clientX - box.left - left) / (right - left)) * (last - first);
    const [step, loss, rate, norm] = rows.reduce((best, row) => (Math.abs(row[0] - wanted) < Math.abs(best[0] - wanted) ? row : best));
    const lines = [`step ${step}`, `loss ${loss.toPrecision(4)}`];
    if (Number.isFinite(rate)) lines.push(`learning rate ${rate.toExponential(2)}`);
    if (Number.isFinite(norm)) lines.push(`gradient norm ${norm.toPrecision(3)}`);
    this.tip.textContent = lines.join("\n");
    svg.append(this.cross);
    const at = left + ((step - first) / (last - first)) * (right - left), isRight = at > box.width / 2;
    this.tip.style.left = isRight ? "auto" : `${at + 14}px`;
    this.tip.style.right = isRight ? `${box.width - at + 14}px` : "auto";
    for (const [name, value] of Object.entries({ x1: at, x2: at, y1: 0, y2: box.height - 30 })) this.cross.setAttribute(name, value);
  }
}
