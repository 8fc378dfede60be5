// The two ends of the sound, on the audio thread: a queue that plays without gaps, and a microphone in 20 ms blocks.

const RATE = 24000;                 // Hz, of both directions
const FADE = 0.006;                 // s: the voice falls silent without a click

// Plays Float32 samples at RATE, resampled linearly where the context runs at another rate; says what was really heard.
class Speaker extends AudioWorkletProcessor {
  constructor() {
    super();
    this.queue = [];                // {turn, samples}
    this.at = 0;                    // position in the first block, in samples at RATE
    this.queued = 0;
    this.turn = null;
    this.heard = 0;                 // samples of this turn that were played
    this.playing = false;           // false while a few blocks are gathered
    this.cushion = 0.06 * RATE;     // grows when the network could not keep up
    this.ended = null;              // the turn that gets no more samples
    this.gain = 1;
    this.goal = 1;
    this.last = 0;
    this.level = 0;
    this.tick = 0;
    this.port.onmessage = (event) => this.take(event.data);
  }

  take(message) {
    if (message.samples) {
      if (message.turn !== this.turn) this.begin(message.turn);
      this.queue.push(message.samples);
      this.queued += message.samples.length;
    } else if (message.end !== undefined) {
      if (message.end !== this.turn) this.begin(message.end);
      this.ended = message.end;
    } else if (message.duck !== undefined) {
      this.goal = message.duck;
    } else if (message.silence) {
      this.fading = true;
      this.goal = 0;
      if (!this.playing) this.stop("stopped");
    }
  }

  begin(turn) {
    Object.assign(this, {queue: [], at: 0, queued: 0, turn, heard: 0, playing: false, ended: null, fading: false, goal: 1, gain: 1});
  }

  stop(why) {
    const turn = this.turn;
    if (turn === null) return;
    this.port.postMessage({kind: why, turn, heard: this.heard / RATE});
    this.begin(null);
  }

  process(inputs, outputs) {
    const out = outputs[0][0];
    if (this.turn !== null && !this.playing && (this.queued >= this.cushion || (this.ended !== null && this.queued > 0))) {
      this.playing = true;
      if (this.heard === 0) this.port.postMessage({kind: "started", turn: this.turn, after: out.length / sampleRate});
    }
    if (this.playing) this.fill(out);
    else if (this.ended !== null && this.turn !== null) this.stop("ended");
    for (const channel of outputs[0].slice(1)) channel.set(out);
    this.report(out);
    return true;
  }

  fill(out) {
    const step = RATE / sampleRate, change = 1 / (FADE * sampleRate);
    for (let i = 0; i < out.length; i++) {
      if (!this.queue.length) {
        if (this.fading) this.stop("stopped");
        else if (this.ended !== null) this.stop("ended");
        else { this.playing = false; this.cushion = Math.min(0.4 * RATE, this.cushion * 2); this.port.postMessage({kind: "starved", turn: this.turn}); }
        return;
      }
      const block = this.queue[0], whole = Math.floor(this.at), part = this.at - whole;
      const next = whole + 1 < block.length ? block[whole + 1] : this.queue.length > 1 ? this.queue[1][0] : block[whole];
      this.gain += Math.max(-change, Math.min(change, this.goal - this.gain));
      out[i] = (block[whole] * (1 - part) + next * part) * this.gain;
      this.at += step;
      this.heard += step;
      this.queued -= step;
      if (this.at >= block.length) { this.at -= block.length; this.queue.shift(); }
      if (this.fading && this.gain <= 0) { this.stop("stopped"); return; }
    }
  }

  report(out) {
    for (const sample of out) this.level = Math.max(this.level, Math.abs(sample));
    this.tick += out.length / sampleRate;
    if (this.tick < 0.04) return;
    this.port.postMessage({kind: "level", level: this.level, turn: this.turn, heard: this.heard / RATE});
    this.tick = this.level = 0;
  }
}

// Microphone: mono, RATE, blocks of 20 ms as 16-bit numbers, with their peak.
class Listener extends AudioWorkletProcessor {
  constructor() {
    super();
    this.block = new Int16Array(RATE / 50);
    this.count = 0;
    this.peak = 0;
    this.at = 0;                    // where the next output sample lies among the inputs, after `before`
    this.before = 0;
    this.smooth = [0, 0];
    this.port.onmessage = () => { this.over = true; };
  }

  process(inputs) {
    const input = inputs[0][0];
    if (input) this.resample(input);
    return !this.over;
  }

  resample(input) {
    const step = sampleRate / RATE;
    const a = step > 1.01 ? 1 - Math.exp(-2 * Math.PI * 0.42 / step) : 1;        // what would fold back is weakened first: two one-pole filters
    for (const raw of input) {
      this.smooth[0] += a * (raw - this.smooth[0]);
      this.smooth[1] += a * (this.smooth[0] - this.smooth[1]);
      const sample = this.smooth[1];
      for (; this.at < 1; this.at += step) this.put(this.before + (sample - this.before) * this.at);
      this.at -= 1;
      this.before = sample;
    }
  }

  put(sample) {
    const clipped = Math.max(-1, Math.min(1, sample));
    this.peak = Math.max(this.peak, Math.abs(clipped));
    this.block[this.count++] = Math.round(clipped * 32767);
    if (this.count < this.block.length) return;
    const full = this.block;
    this.block = new Int16Array(full.length);
    this.port.postMessage({pcm: full.buffer, peak: this.peak}, [full.buffer]);
    this.count = this.peak = 0;
  }
}

registerProcessor("speaker", Speaker);
registerProcessor("listener", Listener);
