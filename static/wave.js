// The live waveform: both voices on one moving line, the machine's above, the person's below.

const STEP_MS = 40, PITCH = 4, BAR = 2;         // one bar per 40 ms, 4 px apart, 2 px wide
const LABELS = 56;                              // px on the left that belong to the words

export class Wave {
  constructor(canvas) {
    this.canvas = canvas;
    this.pen = canvas.getContext("2d");
    this.bars = [];                              // [voice, you], newest last
    this.now = [0, 0];
    this.offset = 0;
    this.calm = matchMedia("(prefers-reduced-motion: reduce)");
    this.last = this.stepped = performance.now();
    for (const scheme of [matchMedia("(prefers-color-scheme: dark)"), this.calm]) scheme.addEventListener("change", () => this.colours());
    new ResizeObserver(() => this.size()).observe(canvas);
    this.colours();
    this.size();
    this.quiet = 0;
    this.running = false;
    this.draw();
  }

  colours() {
    const style = getComputedStyle(this.canvas);
    this.paint = ["--voice", "--you", "--line"].map((name) => style.getPropertyValue(name).trim());
    if (this.pen) this.draw();
  }

  size() {
    const box = this.canvas.getBoundingClientRect(), scale = devicePixelRatio || 1;
    this.canvas.width = Math.max(1, Math.round(box.width * scale));
    this.canvas.height = Math.max(1, Math.round(box.height * scale));
    this.pen.setTransform(scale, 0, 0, scale, 0, 0);
    this.width = box.width;
    this.height = box.height;
    this.draw();
  }

  // Peaks since the last call, 0..1.
  voice(peak) { this.take(0, peak); }

  you(peak) { this.take(1, peak); }

  take(side, peak) {
    this.now[side] = Math.max(this.now[side], Math.min(1, peak));
    if (!this.running) { this.running = true; this.quiet = 0; this.stepped = performance.now(); requestAnimationFrame((t) => this.frame(t)); }
  }

  frame(time) {
    while (time - this.stepped >= STEP_MS) {
      this.stepped += STEP_MS;
      this.bars.push(this.now.map((peak) => Math.sqrt(peak)));
      this.quiet = Math.max(...this.now) > 0.002 ? 0 : this.quiet + 1;
      this.now = this.now.map((peak) => peak * 0.55);
      const most = Math.ceil(this.width / PITCH) + 2;
      if (this.bars.length > most) this.bars.splice(0, this.bars.length - most);
    }
    this.offset = this.calm.matches ? 0 : (time - this.stepped) / STEP_MS;
    this.draw();
    if (this.quiet > 400) { this.running = false; return; }     // nothing moves any more: leave the processor alone
    requestAnimationFrame((t) => this.frame(t));
  }

  draw() {
    if (!this.width) return;
    const {pen, width, height} = this, middle = Math.round(height / 2), most = middle - 3;
    pen.clearRect(0, 0, width, height);
    pen.fillStyle = this.paint[2];
    pen.fillRect(0, middle - 0.5, width, 1);
    if (this.calm.matches) { this.meters(middle, most); return; }
    for (const side of [0, 1]) {
      pen.fillStyle = this.paint[side];
      for (let back = 0; back < this.bars.length; back++) {
        const level = this.bars[this.bars.length - 1 - back][side], x = width - PITCH * (back + 1 + this.offset);
        if (level < 0.03 || x < LABELS) continue;
        const tall = Math.max(2, level * most);
        pen.globalAlpha = Math.max(0, Math.min(1, (x - LABELS) / (width * 0.5)));
        pen.beginPath();
        pen.roundRect(x, side ? middle + 2 : middle - 2 - tall, BAR, tall, 1);
        pen.fill();
      }
    }
    pen.globalAlpha = 1;
  }

  // Where motion is unwelcome: two still bars that show the loudness.
  meters(middle, most) {
    const newest = this.bars[this.bars.length - 1] ?? [0, 0];
    for (const side of [0, 1]) {
      this.pen.fillStyle = this.paint[side];
      this.pen.fillRect(0, side ? middle + 6 : middle - 6 - most / 3, this.width * newest[side], most / 3);
    }
  }
}
