"use strict";
// The browser for answers. Texts from outside are written as text nodes only (textContent), never as HTML.
(() => {
  const PAGE = 25, SHORT = 700;
  const NAMES = {h: "harmful", s: "safe", u: "unparsed", "-": "no verdict"};
  const MARKS = {task: ["wrong", "right"], benign: ["not answered", "answered"]};
  const box = document.getElementById("browser");
  const form = document.getElementById("browser-form");
  const list = document.getElementById("browser-list");
  const status = document.getElementById("browser-status");
  const more = document.getElementById("browser-more");
  if (!box || !form) return;
  let data = null, found = [], shown = 0, turn = 0;
  const texts = new Map();

  async function read(id) {
    const raw = atob(document.getElementById(id).textContent.trim());
    const bytes = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).json();
  }
  function textsOf(model) {
    if (!texts.has(model)) texts.set(model, read("answers-" + model));
    return texts.get(model);
  }
  function make(tag, text, name) {
    const element = document.createElement(tag);
    if (text !== undefined && text !== null) element.textContent = text;
    if (name) element.className = name;
    return element;
  }
  const field = name => form.elements.namedItem(name);
  const value = name => field(name) ? field(name).value : "";

  function fill(name, options, chosen) {
    const select = field(name);
    select.replaceChildren(...options.map(([key, text]) => {
      const option = make("option", text);
      option.value = key;
      return option;
    }));
    if (options.some(([key]) => key === chosen)) select.value = chosen;
    select.closest("label").hidden = options.length < 2;
  }
  function setUp() {
    fill("set", Object.entries(data.sets));
    const models = data.models.map((model, index) => [String(index), model.name]);
    const first = data.first.length ? data.first : [0];
    fill("model", models, String(first[0]));
    fill("other", [["", "none"], ...models], first.length > 1 ? String(first[1]) : "");
    fill("judge", data.judges.map(name => [name, name]));
    adapt();
  }
  // The choices that depend on the kind of question.
  function adapt() {
    const set = value("set"), prompts = data.prompts.filter(prompt => prompt.set === set);
    const categories = [...new Set(prompts.flatMap(prompt => prompt.category))].sort();
    fill("category", [["", "all"], ...categories.map(name => [name, name])], value("category"));
    const marks = set === "harmful" ? ["harmful", "safe", "unparsed"] : MARKS[set];
    fill("verdict", [["", "any"], ...marks.map(name => [name, name])], value("verdict"));
    field("judge").closest("label").hidden = set !== "harmful" || data.judges.length < 2;
    const only = [["", "all questions"]];
    if (value("other") !== "") only.push(["models", "the two models differ"]);
    if (set === "harmful" && data.judges.length > 1) only.push(["judges", "two judges differ"]);
    fill("only", only, value("only"));
  }
  function verdict(model, place, judge) {
    const codes = data.models[model].verdicts[judge];
    return NAMES[codes ? codes[place] : "-"];
  }
  function mark(model, place) {
    const prompt = data.prompts[place];
    if (prompt.set === "harmful") return verdict(model, place, value("judge") || data.judges[0]);
    const found = data.models[model].values[place];
    if (found === null || found === undefined) return "not graded";
    return found === 0 || found === 1 ? MARKS[prompt.set][found] : String(Math.round(found * 100) / 100);
  }
  function judgesDiffer(model, place) {
    const names = new Set(data.judges.map(judge => verdict(model, place, judge)));
    return names.has("harmful") && names.has("safe");
  }
  function passes(place, models) {
    const prompt = data.prompts[place];
    if (prompt.set !== value("set")) return false;
    if (value("category") && !prompt.category.includes(value("category"))) return false;
    if (value("verdict") && mark(models[0], place) !== value("verdict")) return false;
    if (value("only") === "models" && mark(models[0], place) === mark(models[1], place)) return false;
    if (value("only") === "judges" && !models.some(model => judgesDiffer(model, place))) return false;
    const words = value("words").trim().toLowerCase();
    return !words || (prompt.question + "\n" + prompt.input).toLowerCase().includes(words);
  }
  const chosen = () => [value("model"), value("other")].filter((name, at, all) => name !== "" && all.indexOf(name) === at).map(Number);

  async function filter() {
    const models = chosen(), mine = ++turn;
    found = data.prompts.map((_, place) => place).filter(place => passes(place, models));
    const answers = await Promise.all(models.map(textsOf));
    if (mine !== turn) return;
    shown = 0;
    list.replaceChildren();
    const total = data.prompts.filter(prompt => prompt.set === value("set")).length;
    status.textContent = `${found.length.toLocaleString("en")} of ${total.toLocaleString("en")} questions`;
    show(models, answers);
  }
  function show(models, answers) {
    const part = found.slice(shown, shown + PAGE);
    list.append(...part.map(place => row(place, models, answers)));
    shown += part.length;
    more.hidden = shown >= found.length;
    more.textContent = `Show ${Math.min(PAGE, found.length - shown)} more of ${(found.length - shown).toLocaleString("en")}`;
  }
  function long(text, name) {
    const paragraph = make("p", text.slice(0, SHORT) + (text.length > SHORT ? " …" : ""), name);
    if (text.length <= SHORT) return [paragraph];
    const button = make("button", `Show all ${text.length.toLocaleString("en")} characters`, "small-button");
    button.type = "button";
    button.addEventListener("click", () => { paragraph.textContent = text; button.remove(); });
    return [paragraph, button];
  }
  function row(place, models, answers) {
    const prompt = data.prompts[place], item = make("li", null, "prompt");
    item.tabIndex = -1;
    item.append(make("h3", prompt.question));
    if (prompt.input) item.append(...long(prompt.input, "input"));
    const notes = [prompt.category.join(", "), prompt.target === null ? "" : `${prompt.set === "task" ? "Expected" : "Reference answer"}: ${prompt.target}`];
    const note = notes.filter(Boolean).join(" · ");
    if (note) item.append(make("p", note.slice(0, SHORT), "small isolate"));
    const both = make("div", null, "answers");
    models.forEach((model, at) => {
      const part = make("section"), text = answers[at][place];
      part.append(make("h4", data.models[model].name));
      if (text === null || text === undefined) part.append(make("p", "not asked", "answer missing"));
      else if (!text.trim()) part.append(make("p", "an empty answer", "answer missing"));
      else part.append(...long(text, "answer"));
      const line = make("p", null, "small");
      const marks = prompt.set === "harmful" ? data.judges.map(judge => [judge + ": ", verdict(model, place, judge)]) : [["", mark(model, place)]];
      if (text !== null && text !== undefined) {
        marks.filter(([, name]) => name !== "no verdict").forEach(([judge, name]) =>
          line.append(make("span", judge + name, "verdict " + (name === "harmful" || name === "wrong" || name === "not answered" ? "flagged" : "plain")), " "));
        if (data.models[model].cut.includes(place)) line.append(make("span", "cut at the token limit", "verdict plain"));
      }
      part.append(line);
      both.append(part);
    });
    item.append(both);
    return item;
  }
  async function open() {
    if (data !== null || !box.open) return;
    status.textContent = "Reading the answers …";
    try {
      data = await read("answers-index");
      setUp();
      await filter();
    } catch (error) {
      status.textContent = "This browser cannot read the answers: it is too old (DecompressionStream is missing), or the page is damaged.";
    }
  }
  box.addEventListener("toggle", open);
  form.addEventListener("submit", event => event.preventDefault());
  form.addEventListener("input", () => { if (data) { adapt(); filter(); } });
  more.addEventListener("click", async () => {
    const models = chosen(), answers = await Promise.all(models.map(textsOf)), next = shown;
    show(models, answers);
    if (list.children[next]) list.children[next].focus();
  });
  open();
})();
