// The page: one conversation over one WebSocket. Sound lives in audio.js and worklet.js, the picture in wave.js.

import {Microphone, Player, RATE, floats} from "./audio.js";
import {Wave} from "./wave.js";

const MAX_UPLOAD = 10 * 2 ** 20;                // bytes
const KEEP_SECONDS = 600;                       // of answers that can be heard again
const HOLD_IDLE_MS = 30000;                     // after holding, the microphone closes by itself
const $ = (id) => document.getElementById(id);
const seconds = (s) => `${s.toFixed(s < 10 ? 2 : 1)} s`;

// ---------------------------------------------------------------- what is said and shown

const WORDS = {
  idle: "Ready", connecting: "Connecting", ready: "Ready", listening: "Listening", hearing: "Hearing you",
  thinking: "Thinking", speaking: "Speaking", lost: "Not connected", locked: "Needs a key",
};

// What went wrong -> what to do. The server's own message is shown as it came.
const FIX = {
  NotAllowedError: "This page may not use the microphone. Allow it beside the address, then press the button again; writing works without.",
  NotFoundError: "No microphone was found. Connect one and press the button again, or write instead.",
  NotReadableError: "Another program holds the microphone. Close it there and press the button again, or write instead.",
  InsecureError: "Browsers lend the microphone only to https pages and to localhost. Open this page there, or write instead.",
};

function show(state) {
  document.body.dataset.state = state;
  $("state_text").textContent = WORDS[state];
  $("stop").hidden = !(state === "speaking" || state === "thinking");
}

function say(words) { $("status").textContent = words; }

function complain(words) {
  $("alert_text").textContent = words;
  $("alert").hidden = false;
}

function forgive() { $("alert").hidden = true; }

// ---------------------------------------------------------------- transcript

const bubbles = new Map();                      // "you:3" -> element
let partial = null, kept = 0;
const sounds = [];                              // {turn, chunks, samples}: answers that can be heard again

function bubble(who, turn) {
  const key = `${who}:${turn}`;
  if (bubbles.has(key)) return bubbles.get(key);
  $("welcome").hidden = true;
  const box = document.createElement("article");
  box.className = `turn ${who}`;
  box.innerHTML = '<h3></h3><p class="words"></p><p class="about"></p>';
  box.querySelector("h3").textContent = who === "you" ? "You" : "Voice";
  follow(() => $("transcript").append(box));
  bubbles.set(key, box);
  return box;
}

// Makes a change to the transcript; its end stays in sight where it was in sight before.
function follow(change) {
  const log = $("transcript"), atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 120;
  change();
  if (atEnd) log.scrollTop = log.scrollHeight;
}

function write(box, heard, unheard = "") {
  follow(() => {
    const words = box.querySelector(".words");
    words.textContent = heard;
    if (!unheard) return;
    const rest = document.createElement("s");
    rest.textContent = unheard;
    words.append(" ", rest);
  });
}

function youSaid(text, turn) {
  if (turn === undefined) turn = `typed${Date.now()}`;
  const typed = talk.typed;
  talk.typed = null;
  if (typed && typed.text === text) { bubbles.set(`you:${turn}`, typed.box); return typed.box; }
  const box = partial ?? bubble("you", turn);
  if (partial) { bubbles.delete("you:partial"); bubbles.set(`you:${turn}`, partial); partial.classList.remove("partial"); partial = null; }
  write(box, text);
  return box;
}

function keepSound(turn, samples) {
  let sound = sounds.find((one) => one.turn === turn);
  if (!sound) sounds.push(sound = {turn, chunks: [], samples: 0});
  sound.chunks.push(samples);
  sound.samples += samples.length;
  kept += samples.length;
  while (kept > KEEP_SECONDS * RATE && sounds.length > 1) {
    const old = sounds.shift();
    kept -= old.samples;
    bubbles.get(`voice:${old.turn}`)?.querySelector("button")?.remove();
  }
}

function offerAgain(turn) {
  const box = bubbles.get(`voice:${turn}`), sound = sounds.find((one) => one.turn === turn);
  if (!box || !sound || box.querySelector("button")) return;
  const button = document.createElement("button");
  button.type = "button";
  button.className = "quiet again";
  button.textContent = "Hear again";
  button.onclick = async () => {
    if (player.busy) stopVoice();
    await player.open();
    for (const chunk of sound.chunks) player.push(`again:${turn}`, chunk);
    player.end(`again:${turn}`);
  };
  follow(() => box.append(button));
}

// ---------------------------------------------------------------- figures

const latencies = new Map();                    // turn -> seconds until the answer was heard, of the last turns

function showLatency(turn) {
  const {heardAfter, model} = talk.about.get(turn);
  if (heardAfter === undefined) return;
  latencies.set(turn, heardAfter);
  if (latencies.size > 6) latencies.delete(latencies.keys().next().value);
  $("latency_now").textContent = seconds(heardAfter);
  $("latency_about").textContent = `From the end of your turn until you heard the answer${model === undefined ? "." : `; ${seconds(model)} of it in the model.`}`;
  const most = Math.max(...latencies.values());
  $("latency_bars").replaceChildren(...[...latencies.values()].map((value) => {
    const row = document.createElement("li"), bar = document.createElement("span"), text = document.createElement("span");
    bar.className = "bar";
    bar.style.width = `${Math.max(2, 100 * value / most)}%`;
    text.textContent = seconds(value);
    row.append(bar, text);
    return row;
  }));
}

function showMemory(memory) {
  if (!memory) return;
  const {context_positions: used, context_limit: limit, slots} = memory;
  $("memory").max = limit || 1;
  $("memory").value = used || 0;
  const older = slots ? `, ${slots} memory slot${slots === 1 ? "" : "s"}` : "";
  $("memory_about").textContent = `${(used ?? 0).toLocaleString("en")} of ${(limit ?? 0).toLocaleString("en")} positions${older}`;
}

function describeTurn(turn) {
  const about = talk.about.get(turn) ?? {}, parts = [];
  if (about.heardAfter !== undefined) parts.push(`first sound after ${seconds(about.heardAfter)}`);
  if (about.model !== undefined) parts.push(`model ${seconds(about.model)}`);
  if (about.duration !== undefined) parts.push(`${seconds(about.duration)} long`);
  if (about.interrupted !== undefined) parts.push(`stopped after ${seconds(about.interrupted)}`);
  const line = bubbles.get(`voice:${turn}`)?.querySelector(".about");
  if (line) follow(() => { line.textContent = parts.join(" \u00b7 "); });
}

// ---------------------------------------------------------------- the conversation

const talk = {
  socket: null, opening: null, key: sessionStorage.getItem("key") || "", voice: null, upload: null, recording: false, held: false,
  turn: null,                                   // of the answer that is being made
  making: false,                                // it is not complete yet
  next: null,                                   // turn of the next binary frame
  dead: new Set(),                              // answers that were stopped: what still arrives of them is dropped
  about: new Map(), typed: null, ended: null, floor: 0.01, loud: 0,
};

const player = new Player({
  level: (peak) => wave.voice(peak),
  started(turn, delay) {
    if (String(turn).startsWith("again:")) return;
    show("speaking");
    const about = aboutOf(turn);
    if (talk.ended === null) return;
    about.heardAfter = Math.max(0, performance.now() - talk.ended) / 1000 + delay;
    talk.ended = null;
    showLatency(turn);
    describeTurn(turn);
  },
  ended: (turn, heard) => finish(turn, heard),
  stopped: (turn, heard) => finish(turn, heard),
  starved() {},
});

const microphone = new Microphone({
  block(pcm, peak) {
    talk.floor = Math.min(0.05, Math.max(0.003, talk.floor + (peak - talk.floor) * (peak < talk.floor ? 0.2 : 0.002)));
    if (peak > Math.max(0.015, 4 * talk.floor)) talk.loud = performance.now();
    const open = holding() ? talk.held : true;
    if (open) wave.you(peak);
    if (open && talk.socket?.readyState === WebSocket.OPEN && talk.socket.started) talk.socket.send(pcm);
  },
  lost() { microphoneOff(); complain("The microphone went away. Connect it and press the button again, or write instead."); },
});

const wave = new Wave($("wave"));
const holding = () => document.querySelector('input[name="mode"]:checked').value === "hold";
const resting = () => (microphone.on && !holding() ? "listening" : talk.socket ? "ready" : "idle");

function aboutOf(turn) {
  if (!talk.about.has(turn)) talk.about.set(turn, {});
  return talk.about.get(turn);
}

function send(message) { if (talk.socket?.readyState === WebSocket.OPEN) talk.socket.send(JSON.stringify(message)); }

function finish(turn, heard) {
  wave.voice(0);
  if (String(turn).startsWith("again:")) return;
  send({type: "played", ms: Math.round(heard * 1000)});
  offerAgain(turn);
  if (!talk.making) show(resting());
}

// Silence at once; the server learns how much was heard when the player has stopped.
function stopVoice() {
  if (talk.making && talk.turn !== null) talk.dead.add(talk.turn);
  if (player.busy && !String(player.turn).startsWith("again:")) {
    const turn = player.turn;
    talk.dead.add(turn);
    aboutOf(turn).interrupted = player.heard;
    describeTurn(turn);
  }
  player.silence();
  if (talk.making) send({type: "cancel"});
  talk.making = false;
  show(resting());
}

const HEAR = {
  ready(event) {
    talk.socket.started = true;
    if (event.voices?.[0]?.id) listVoices(event.voices);
    $("model").textContent = event.model ? `Model: ${event.model}` : "";
    if (talk.recording) send({type: "voice_prompt", audio: talk.upload.audio, text: null});
    show(resting());
    talk.socket.proceed();
  },
  speech_started() {
    show("hearing");
    if (player.busy) player.duck(0.2);
  },
  speech_stopped() {
    talk.ended = Math.min(performance.now(), talk.loud || performance.now());
    player.duck(1);
    if (!player.busy) show("thinking");
  },
  partial_transcript(event) {
    if (!event.text) return;
    partial ??= bubble("you", "partial");
    partial.classList.add("partial");
    write(partial, event.text);
  },
  transcript(event) {
    youSaid(event.text, event.turn);
    say(`You: ${event.text}`);
  },
  reply_started(event) {
    talk.turn = event.turn;
    talk.making = true;
    if (!player.busy) show("thinking");
    HEAR.reply_text(event);
  },
  reply_text(event) { if (event.text) { aboutOf(event.turn).text = event.text; write(bubble("voice", event.turn), event.text); } },
  audio(event) { talk.next = event.turn; },
  reply_done(event) {
    talk.making = false;
    const about = aboutOf(event.turn);
    if (event.text) HEAR.reply_text(event);
    if (event.latency_ms?.first_audio != null) about.model = event.latency_ms.first_audio / 1000;
    if (event.duration_s != null) about.duration = event.duration_s;
    showMemory(event.memory);
    showLatency(event.turn);
    describeTurn(event.turn);
    if (!talk.dead.has(event.turn)) player.end(event.turn);
    if (!player.busy) show(resting());
    if ($("announce").checked) say(`Voice: ${about.text ?? ""}`);
  },
  interrupted(event) {
    talk.dead.add(event.turn);
    talk.making = false;
    if (player.turn === event.turn) player.silence();
    const about = aboutOf(event.turn), box = bubbles.get(`voice:${event.turn}`), whole = about.text ?? "";
    about.interrupted = (event.heard_ms ?? 0) / 1000;
    if (box && event.text !== undefined && whole) {
      const heard = whole.startsWith(event.text) ? event.text : whole.slice(0, event.text.length);
      write(box, heard.trim(), whole.slice(heard.length).trim());
    }
    describeTurn(event.turn);
    offerAgain(event.turn);
    if (document.body.dataset.state !== "hearing") show(resting());
  },
  error(event) {
    if (event.code === "key") { talk.socket.wanted = true; askForKey(); return; }
    talk.socket.said = true;
    complain(event.message || "The server could not do that.");
    if (talk.making && player.busy) player.end(talk.turn);      // nothing more comes of this turn
    talk.making = false;
    if (!player.busy) show(resting());
  },
};

function hearSound(buffer) {
  const turn = talk.next;
  talk.next = null;
  if (turn === null || talk.dead.has(turn)) return;
  const samples = floats(buffer);
  keepSound(turn, samples);
  player.push(turn, samples);
}

// ---------------------------------------------------------------- the connection

function connect() {
  talk.opening ??= new Promise((resolve, reject) => {
    show("connecting");
    const address = new URL("v1/conversation", location.href);
    address.protocol = address.protocol === "https:" ? "wss:" : "ws:";
    const socket = talk.socket = new WebSocket(address);
    socket.binaryType = "arraybuffer";
    socket.proceed = resolve;
    socket.onopen = () => {
      if (talk.key) send({type: "auth", key: talk.key});
      send({type: "start", voice: talk.voice, sample_rate: RATE, responder: null});
    };
    socket.onmessage = (event) => {
      if (event.data instanceof ArrayBuffer) { hearSound(event.data); return; }
      const message = JSON.parse(event.data);
      if (message.type !== "error") socket.said = false;
      HEAR[message.type]?.(message);
    };
    socket.onclose = (event) => { reject(new Error("closed")); left(socket, event); };
  });
  return talk.opening;
}

function left(socket, event) {
  if (talk.socket !== socket) return;
  const began = socket.started;
  talk.socket = talk.opening = null;
  talk.making = false;
  if (!socket.wanted) {
    if ([1008, 3000, 4001, 4401].includes(event.code) && !began) { askForKey(); return; }
    const why = event.reason || (began ? "The connection ended" : "The server cannot be reached");
    if (!socket.said) complain(`${why.replace(/\.$/, "")}. ${began ? "Speak or write to begin a new conversation." : "Check that it runs, then try again."}`);
  }
  microphoneOff();
  show(!$("key_form").hidden ? "locked" : socket.wanted ? "idle" : "lost");
}

// True when there is a conversation to speak into.
async function ready() {
  if (!$("key_form").hidden) { $("key").focus(); return false; }
  try {
    await player.open();
    await connect();
    return true;
  } catch { return false; }
}

function hangUp() {
  const socket = talk.socket;
  if (!socket) return;
  socket.wanted = true;
  send({type: "close"});
  socket.close();
}

function askForKey() {
  if (talk.key) complain("The server does not know this key. Check it and try again.");
  talk.key = "";
  sessionStorage.removeItem("key");
  $("key_form").hidden = false;
  show("locked");
  $("key").focus();
}

async function loadVoices() {
  const headers = talk.key ? {Authorization: `Bearer ${talk.key}`} : {};
  try {
    const answer = await fetch("v1/audio/voices", {headers});
    if (answer.status === 401 || answer.status === 403) { askForKey(); return; }
    if (!answer.ok) throw new Error(`The server answered ${answer.status}`);
    listVoices((await answer.json()).voices);
    if (!talk.socket) show("idle");
  } catch (error) {
    show("lost");
    complain(`${error instanceof TypeError ? "The server cannot be reached" : error.message}. Check that it runs, then reload this page.`);
  }
}

function listVoices(voices) {
  const list = $("voice"), before = talk.voice;
  list.replaceChildren(...voices.map((voice) => {
    const option = new Option(voice.name ?? voice.id, voice.id);
    option.dataset.about = voice.description ?? "";
    return option;
  }));
  if (talk.upload) list.append(new Option(`Your recording: ${talk.upload.name}`, "upload"));
  list.value = talk.recording ? "upload" : voices.some((voice) => voice.id === before) ? before : voices[0]?.id ?? "";
  talk.voice = list.value === "upload" ? before : list.value;
  describeVoice();
}

function describeVoice() {
  const chosen = $("voice").selectedOptions[0];
  $("voice_about").textContent = chosen?.dataset.about ?? "";
  $("summary_voice").textContent = chosen?.textContent ?? "";
}

// ---------------------------------------------------------------- what the person does

function submitText(event) {
  event.preventDefault();
  const text = $("text").value.trim();
  $("text").focus();
  if (text) sendText(text);
}

async function sendText(text) {
  forgive();
  if (!await ready()) return;
  if (talk.making || player.busy) stopVoice();
  $("text").value = "";
  const box = bubble("you", `typed${Date.now()}`);
  write(box, text);
  $("transcript").scrollTop = $("transcript").scrollHeight;
  talk.typed = {text, box};
  talk.ended = performance.now();
  send({type: "text", text});
  show("thinking");
}

function microphoneOff() {
  microphone.close();
  talk.held = false;
  $("mic").setAttribute("aria-pressed", "false");
  micWords();
}

function micWords() {
  $("mic_text").textContent = holding() ? "Hold to speak" : microphone.on ? "Turn the microphone off" : "Turn the microphone on";
}

async function microphoneOn() {
  forgive();
  if (!await ready()) return false;
  try { await microphone.open(); }
  catch (error) { complain(FIX[error.name] ?? `The microphone cannot be opened (${error.message}). Write instead.`); microphoneOff(); return false; }
  micWords();
  return true;
}

async function toggleMicrophone() {
  if (holding()) return;
  if (microphone.on) { microphoneOff(); show(resting()); say("The microphone is off"); return; }
  if (!await microphoneOn()) return;
  $("mic").setAttribute("aria-pressed", "true");
  show(player.busy ? "speaking" : "listening");
  say("Listening");
}

let wanted = false, idle = 0;

async function hold() {
  if (wanted) return;
  wanted = true;
  clearTimeout(idle);
  if (player.busy || talk.making) stopVoice();
  if (!await microphoneOn() || !wanted) return;
  talk.held = true;
  $("mic").setAttribute("aria-pressed", "true");
  show("hearing");
}

function release() {
  if (!wanted) return;
  wanted = false;
  $("mic").setAttribute("aria-pressed", "false");
  if (!talk.held) return;
  talk.held = false;
  talk.ended = performance.now();
  send({type: "end_of_turn"});
  show("thinking");
  idle = setTimeout(microphoneOff, HOLD_IDLE_MS);
}

async function uploadVoice() {
  const file = $("upload").files[0];
  $("upload").value = "";
  if (!file) return;
  forgive();
  if (file.size > MAX_UPLOAD) { complain(`${file.name} is larger than ${MAX_UPLOAD / 2 ** 20} MB. Choose a recording of some seconds.`); return; }
  const bytes = new Uint8Array(await file.arrayBuffer());
  let binary = "";
  for (let i = 0; i < bytes.length; i += 32768) binary += String.fromCharCode(...bytes.subarray(i, i + 32768));
  talk.upload = {name: file.name, audio: btoa(binary)};
  talk.recording = true;
  const list = $("voice");
  list.querySelector('option[value="upload"]')?.remove();
  list.append(new Option(`Your recording: ${file.name}`, "upload"));
  list.value = "upload";
  describeVoice();
  if (talk.socket?.started) send({type: "voice_prompt", audio: talk.upload.audio, text: null});
  say(`The next answers speak with your recording ${file.name}`);
}

function chooseVoice() {
  const id = $("voice").value;
  describeVoice();
  talk.recording = id === "upload";
  if (talk.recording) send({type: "voice_prompt", audio: talk.upload.audio, text: null});
  else send({type: "voice", voice: talk.voice = id});
}

function newConversation() {
  stopVoice();
  hangUp();
  microphoneOff();
  bubbles.clear();
  talk.about.clear();
  talk.dead.clear();
  latencies.clear();
  $("latency_now").textContent = "\u2013";
  $("latency_bars").replaceChildren();
  sounds.length = kept = 0;
  partial = talk.typed = null;
  for (const box of $("transcript").querySelectorAll(".turn")) box.remove();
  $("welcome").hidden = false;
  $("memory").value = 0;
  $("memory_about").textContent = "Nothing yet.";
  say("A new conversation");
}

// ---------------------------------------------------------------- wiring

$("composer").addEventListener("submit", submitText);
for (const button of document.querySelectorAll(".starter")) button.addEventListener("click", () => { $("text").focus(); sendText(button.textContent); });
$("mic").addEventListener("click", toggleMicrophone);
$("mic").addEventListener("pointerdown", (event) => { if (holding()) { $("mic").setPointerCapture(event.pointerId); hold(); } });
for (const kind of ["pointerup", "pointercancel", "blur"]) $("mic").addEventListener(kind, release);
$("mic").addEventListener("keydown", (event) => { if (holding() && (event.key === " " || event.key === "Enter")) { event.preventDefault(); if (!event.repeat) hold(); } });
$("mic").addEventListener("keyup", (event) => { if (holding() && (event.key === " " || event.key === "Enter")) { event.preventDefault(); release(); } });
$("mic").addEventListener("contextmenu", (event) => { if (holding()) event.preventDefault(); });
for (const radio of document.querySelectorAll('input[name="mode"]')) radio.addEventListener("change", () => { microphoneOff(); show(resting()); });
$("stop").addEventListener("click", () => { stopVoice(); $("text").focus(); });
$("voice").addEventListener("change", chooseVoice);
$("upload").addEventListener("change", uploadVoice);
$("reset").addEventListener("click", () => { newConversation(); $("text").focus(); });
$("alert_close").addEventListener("click", () => { forgive(); $("text").focus(); });
document.addEventListener("keydown", (event) => { if (event.key === "Escape" && (player.busy || talk.making)) stopVoice(); });
$("key_form").addEventListener("submit", (event) => {
  event.preventDefault();
  talk.key = $("key").value.trim();
  sessionStorage.setItem("key", talk.key);
  $("key_form").hidden = true;
  $("key").value = "";
  forgive();
  loadVoices().then(() => $("text").focus());
});
addEventListener("pagehide", hangUp);

const wide = matchMedia("(min-width: 860px)");
const unfold = () => { $("panel").open = wide.matches; };
wide.addEventListener("change", unfold);
unfold();
micWords();
loadVoices();
