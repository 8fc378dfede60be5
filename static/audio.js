// Sound in and out of the page. Knows nothing of the server or of what is shown.

export const RATE = 24000;

// One context for everything; made on the first gesture, as browsers want it.
let context = null, module = null;

async function openContext() {
  if (!context || context.state === "closed") {
    try { context = new AudioContext({sampleRate: RATE, latencyHint: "interactive"}); }
    catch { context = new AudioContext({latencyHint: "interactive"}); }
    module = context.audioWorklet.addModule(new URL("worklet.js", import.meta.url));
  }
  await module;
  if (context.state === "suspended") await context.resume();
  return context;
}

export function floats(bytes) {
  const numbers = new Int16Array(bytes.slice(0, bytes.byteLength & ~1));
  return Float32Array.from(numbers, (n) => n / 32768);
}

// Plays turns one at a time without gaps. Calls hooks: started(turn, delay s), ended(turn, heard s), stopped(turn, heard s), level(peak), starved(turn).
export class Player {
  constructor(hooks) {
    this.hooks = hooks;
    this.node = null;
    this.turn = null;               // what plays or is about to
    this.heard = 0;                 // seconds of it
    this.ready = null;
  }

  open() {
    this.ready ??= this.build().catch((error) => { this.ready = null; throw error; });
    return this.ready.then(() => context.state === "suspended" ? context.resume() : undefined);
  }

  async build() {
    const audio = await openContext();
    this.node = new AudioWorkletNode(audio, "speaker", {numberOfInputs: 0, outputChannelCount: [1]});
    this.node.port.onmessage = (event) => this.tell(event.data);
    this.node.connect(audio.destination);
  }

  tell(message) {
    const {kind, turn} = message;
    if (kind === "level") { if (turn !== null && turn === this.turn) this.heard = message.heard; this.hooks.level(message.level); return; }
    if (kind === "started") this.hooks.started(turn, message.after + (context.outputLatency || context.baseLatency || 0));
    if (kind === "starved") this.hooks.starved(turn);
    if (kind === "ended" || kind === "stopped") {
      if (this.turn === turn) { this.turn = null; this.heard = 0; }
      this.hooks[kind](turn, message.heard);
    }
  }

  get busy() { return this.turn !== null; }

  push(turn, samples) { this.turn = turn; this.node?.port.postMessage({turn, samples}); }

  end(turn) { this.node?.port.postMessage({end: turn}); }

  duck(level) { this.node?.port.postMessage({duck: level}); }

  silence() { this.node?.port.postMessage({silence: true}); }
}

// The microphone as 20 ms blocks of 16-bit samples: hook block(ArrayBuffer, peak), lost() when the device goes away.
export class Microphone {
  constructor(hooks) {
    this.hooks = hooks;
    this.stream = this.node = this.source = this.own = null;
  }

  get on() { return this.stream !== null; }

  async open() {
    if (this.on) return;
    if (!navigator.mediaDevices?.getUserMedia) throw Object.assign(new Error("insecure"), {name: "InsecureError"});
    const audio = await openContext();
    const stream = await navigator.mediaDevices.getUserMedia({audio: {channelCount: 1, echoCancellation: true, noiseSuppression: true, autoGainControl: true}});
    try { await this.connect(audio, stream); }
    catch (error) {
      if (error.name !== "NotSupportedError") { stream.getTracks().forEach((track) => track.stop()); throw error; }
      this.own = new AudioContext();                              // a browser that wants the microphone's own rate; the worklet resamples
      await this.own.audioWorklet.addModule(new URL("worklet.js", import.meta.url));
      await this.connect(this.own, stream);
    }
    this.stream = stream;
    stream.getTracks()[0].onended = () => { this.close(); this.hooks.lost(); };
  }

  async connect(audio, stream) {
    this.source = audio.createMediaStreamSource(stream);
    this.node = new AudioWorkletNode(audio, "listener", {numberOfOutputs: 0});
    this.node.port.onmessage = (event) => this.hooks.block(event.data.pcm, event.data.peak);
    this.source.connect(this.node);
  }

  close() {
    this.stream?.getTracks().forEach((track) => { track.onended = null; track.stop(); });
    this.source?.disconnect();
    this.node?.port.postMessage("over");
    this.own?.close();
    this.stream = this.node = this.source = this.own = null;
  }
}
