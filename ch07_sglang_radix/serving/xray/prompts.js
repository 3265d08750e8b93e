// Requests that the page sends to the engine it shows: the prompt box, and the workloads whose trees are worth watching.

import { fit, plain } from "./events.js";

const $ = (id) => document.getElementById(id);
const ANSWERS = 30;   // kept on the page

const SAYS = ["\ue000", "\ue001", "\ue002"];   // where a chat template has system, user and assistant (router.py)

// Fills a chat: turns are user, assistant, user, ...; without a template the words alone.
function chat(source, turns) {
  if (!source.chat) return [source.system ?? "", ...turns].filter(Boolean).join("\n") + "\n";
  const put = (text, words) => SAYS.reduce((filled, place, i) => filled.split(place).join(words[i] ?? ""), text);
  let text = put(source.chat.first, [source.system, turns[0]]);
  for (let i = 1; i + 1 < turns.length; i += 2) text += put(source.chat.next, ["", turns[i + 1], turns[i]]);
  return text;
}

// POST: the answer as JSON. Throws an Error with the server's own words.
async function post(path, body) {
  const key = $("key").value;
  const headers = { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
  const response = await fetch(path, { method: "POST", headers, body: JSON.stringify(body) });
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(answer.error?.message ?? answer.error ?? `${response.status} ${response.statusText}`);
  return answer;
}

const QUESTIONS = [
  "What is a radix cache?", "What is tensor parallelism?", "Explain continuous batching.", "What does chunked prefill mean?",
  "What is the KV cache?", "Define retraction.", "What is a page table?", "什么是全归约？",
];
const WORDS = ["all-gather", "all-reduce", "admission control", "arithmetic intensity", "scheduler", "prefill", "decode", "page table"];
const pause = (ms) => new Promise((done) => setTimeout(done, ms));

// send(turns, most) -> the answer's text. Each preset is a workload, and what to look at.
const PRESETS = {
  "shared prefix": {
    look: "Eight questions behind one long system prompt: its tokens are computed once, and every later request hangs on the same node.",
    async run(send) {
      const first = send([QUESTIONS[0]]);
      await pause(60);
      await Promise.all([first, ...QUESTIONS.slice(1).map(async (question, i) => {
        await pause(40 * i);
        return send([question]);
      })]);
    },
  },
  "multi-turn": {
    look: "One conversation: every turn sends all turns before it again, and computes only its own words.",
    async run(send) {
      const turns = ["What is a radix cache?"];
      for (const next of ["Say that in Chinese.", "Name two related terms.", "What is prefill?", null]) {
        turns.push(await send(turns), next);
      }
    },
  },
  "tree of thought": {
    look: "One answer, continued in three ways, each of them in two: branches share everything up to the point where they part.",
    async run(send) {
      const root = ["What is a scheduler?"];
      root.push(await send(root));
      await Promise.all(["Say that in Chinese.", "Name two related terms.", "What is a waiting queue?"].map(async (second) => {
        const branch = [...root, second];
        branch.push(await send(branch));
        await Promise.all(["What is prefill?", "What is decode?"].map((third) => send([...branch, third])));
      }));
    },
  },
  "small pool": {
    look: "More than the pool holds: unlocked leaves are evicted, oldest first, and requests that cannot grow go back to the queue.",
    async run(send, pool) {
      const many = Math.min(64, Math.max(12, Math.ceil((2 * pool) / 120)));
      await Promise.all(Array.from({ length: many }, async (_, i) => {
        await pause(25 * i);
        const word = WORDS[i % WORDS.length];
        return send([`${i + 1}. What is ${word}? And what has it to do with ${WORDS[(i * 3 + 1) % WORDS.length]}?`], 96);
      }));
    },
  },
};

// Makes the prompt box and the buttons of the workloads work. poolTokens(): how large the engine's pool is.
export function asking(source, poolTokens) {
  const newLine = () => {
    const line = $("answers").insertBefore(document.createElement("li"), $("answers").firstChild);
    while ($("answers").childElementCount > ANSWERS) $("answers").lastChild.remove();
    line.textContent = "…";
    return line;
  };
  const send = async (text, most) => {
    const line = newLine();
    try {
      const answer = await post("generate", { text, sampling_params: { max_new_tokens: most, temperature: Number($("temperature").value) } });
      const { prompt_tokens, cached_tokens, completion_tokens } = answer.meta_info;
      line.textContent = `${cached_tokens} of ${prompt_tokens} from the tree, ${completion_tokens} new: ${fit(plain(answer.text), 300)}`;
      return answer.text;
    } catch (error) {
      line.textContent = error.message;
      line.className = "gone";
      throw error;
    }
  };
  const most = () => Number($("most").value);
  const sendChat = (turns, tokens = most()) => send(chat(source, turns), tokens);

  const ORDERS = { pause_generation: { mode: "in_place" }, step_generation: { steps: 1 }, continue_generation: {} };
  for (const button of $("engine").querySelectorAll("button")) {
    button.addEventListener("click", () => post(button.dataset.path, ORDERS[button.dataset.path]).catch((error) => {
      Object.assign(newLine(), { textContent: error.message, className: "gone" });
    }));
  }
  $("as-chat-label").hidden = !source.chat;
  $("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    const words = $("prompt").value, asChat = source.chat && $("as-chat").checked;
    send(asChat ? chat(source, [words]) : words, most()).catch(() => {});   // said in the list
  });
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    $("ask").requestSubmit();
  });
  $("chapters").replaceChildren(...Object.entries(PRESETS).map(([name, preset]) => {
    const button = document.createElement("button");
    button.textContent = name;
    button.title = preset.look;
    button.addEventListener("click", async () => {
      button.disabled = true;
      await preset.run(sendChat, poolTokens()).catch(() => {});   // said in the list
      button.disabled = false;
    });
    return button;
  }));
}
