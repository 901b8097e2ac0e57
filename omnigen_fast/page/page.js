// What the page does in the browser: tags of images, the mask, this tab's pictures and fields.
// `OMNIGEN` names the fields in their order, and what they are kept under.
const omnigen = (() => {
  "use strict";
  const SAME = {__type__: "update"};  // Gradio: leaves a component as it is
  const IMAGES = ["image_1", "image_2", "image_3"];
  const MAX_PIXELS = 16e6;  // of a canvas that phones still make
  const MAX_KEPT = 24;  // pictures that are listed
  const by = (id) => document.getElementById(id);
  const say = (text) => { const notice = by("notice"); if (notice) notice.textContent = text; };
  const at = (name) => OMNIGEN.names.indexOf(name);
  const address = (path) =>
    new URL("gradio_api/file=" + path.split("/").map(encodeURIComponent).join("/"),
      document.baseURI.split(/[?#]/)[0]).href;

  // What this tab remembers: nothing of it leaves the browser, and it ends with the tab.
  const storage = (part) => `omnigen-fast ${OMNIGEN.key} ${part}`;
  function read(part, otherwise) {
    try {
      return JSON.parse(sessionStorage.getItem(storage(part))) ?? otherwise;
    } catch { return otherwise; }
  }
  function write(part, value) {
    try { sessionStorage.setItem(storage(part), JSON.stringify(value)); } catch { /* full */ }
  }

  function file(path, name) {
    return {path, url: address(path), orig_name: name || path.split("/").pop(), is_stream: false,
      meta: {_type: "gradio.FileData"}};
  }
  async function isThere(path) {
    try { return (await fetch(address(path), {method: "HEAD"})).ok; } catch { return false; }
  }

  // Fields

  function keep(values) {
    const fields = {};
    OMNIGEN.names.forEach((name, i) => {
      if (name !== "mask") fields[name] = IMAGES.includes(name) ? values[i]?.path ?? null : values[i];
    });
    write("fields", fields);
  }
  async function restore(values) {
    drawPictures();
    const kept = read("fields", null);
    const found = kept ? await filled(values, kept) : values.map(() => SAME);
    setTimeout(() => { page.restored = true; });
    return found;
  }
  async function filled(values, settings) {
    const gone = [];
    const found = await Promise.all(OMNIGEN.names.map(async (name, i) => {
      if (!(name in settings) || name === "mask") return SAME;
      const value = settings[name];
      if (!IMAGES.includes(name)) return value === values[i] ? SAME : value;
      if (!value) return null;
      if (value === values[i]?.path) return SAME;
      if (await isThere(value)) return file(value);
      gone.push(name.replace("_", " "));
      return null;
    }));
    if (gone.length) say(`No longer on the server: ${gone.join(", ")}. Upload again.`);
    return found;
  }

  // Tags of images in the prompt

  const tag = (number) => `<img><|image_${number}|></img>`;
  const tagOf = (number) => new RegExp(`(?:<img>)?<\\|image_${number}\\|>(?:</img>)?`, "g");
  function withTag(prompt, number) {
    if (tagOf(number).test(prompt)) return prompt;
    let end = 0;
    for (let before = 1; before < number; before++)
      for (const match of prompt.matchAll(tagOf(before)))
        end = Math.max(end, match.index + match[0].length);
    const [head, tail] = [prompt.slice(0, end), prompt.slice(end).trimStart()];
    return [head, tag(number), tail].filter(Boolean).join(" ") + (tail ? "" : " ");
  }
  function withoutTag(prompt, number) {
    prompt = prompt.replace(new RegExp(`${tagOf(number).source} ?`, "g"), "");
    for (let after = number + 1; after <= IMAGES.length; after++)
      prompt = prompt.replace(tagOf(after), tag(after - 1));
    return prompt;
  }
  const closed = (images) => [...images.filter(Boolean), null, null, null].slice(0, images.length);
  const changed = (values, before) => values.map((one, i) => one === before[i] ? SAME : one);

  function uploaded(number, values) {
    const [prompt, ...images] = values;
    if (!images[number - 1]) return values.map(() => SAME);
    const place = images.slice(0, number).filter(Boolean).length;
    return changed([withTag(prompt || "", place), ...closed(images)], values);
  }
  function cleared(number, values) {
    const [prompt, ...images] = values;
    images[number - 1] = null;
    return changed([withoutTag(prompt || "", number), ...closed(images)], values);
  }

  // This tab's pictures

  let entry = null;  // whose button was pressed
  function made(text) {
    if (!text) return;
    const one = JSON.parse(text);
    write("pictures", [one, ...read("pictures", []).filter((p) => p.path !== one.path)]
      .slice(0, MAX_KEPT));
    drawPictures();
  }
  function drawPictures() {
    const list = document.createElement("ul");
    for (const one of read("pictures", [])) {
      const item = document.createElement("li"), picture = document.createElement("img");
      picture.src = address(one.path);
      picture.alt = `${one.settings.prompt} (seed ${one.settings.seeds || one.settings.seed})`;
      picture.onerror = () => {  // the server has made room
        write("pictures", read("pictures", []).filter((other) => other.path !== one.path));
        item.remove();
      };
      item.append(picture);
      for (const [label, action] of [["Use as input", "use"], ["Use these settings", "settings"]]) {
        const button = document.createElement("button");
        button.type = "button";
        button.textContent = label;
        button.setAttribute("aria-label", `${label}: ${one.name}`);
        button.onclick = () => { entry = one; by(`do-${action}`).click(); };
        item.append(button);
      }
      list.append(item);
    }
    const place = by("pictures");
    if (!place) return;
    place.replaceChildren();
    if (!list.children.length) return;
    const title = document.createElement("h2");
    title.textContent = "Pictures of this tab";
    place.append(title, list);
  }
  function asInput(values) {
    const [prompt, ...images] = values;
    const free = images.findIndex((image) => !image);
    if (!entry || free < 0) {
      say("Three images are given already: take one away first.");
      return values.map(() => SAME);
    }
    images[free] = file(entry.path, entry.name);
    toTheTop();
    return changed([withTag(prompt || "", free + 1), ...images], values);
  }
  async function settings(values) {
    toTheTop();
    if (!entry) return values.map(() => SAME);
    mask.strokes = [];
    drawMask();
    say(entry.masked ? "Paint its mask again." : "");
    return filled(values, entry.settings);
  }

  // The mask: strokes on a canvas of image 1's own size, sent as a black and white PNG

  const mask = {image: null, ready: false, strokes: [], erase: false, sent: null, x: .5, y: .5};
  const brush = () => Number(by("mask-brush").value) / 200;  // its radius, of the longer side
  function hint(text) {
    by("mask-hint").textContent = text;
    by("mask-tools").hidden = by("mask-stage").hidden = !mask.ready;
  }
  function maskOf(image) {
    Object.assign(mask, {image, ready: false, strokes: [], sent: null});
    showImage();
  }
  function showImage() {
    if (!by("mask-hint")) return;  // Gradio makes what is folded away when it is unfolded
    by("mask-editor").dataset.ready = "";
    const shown = by("mask-image"), image = mask.image;
    if (!image?.url) {
      hint("Give image 1, and it can be painted on here.");
      return;
    }
    shown.onload = () => {
      const canvas = by("mask-canvas");
      mask.ready = shown.naturalWidth * shown.naturalHeight <= MAX_PIXELS;
      hint(mask.ready
        ? "Paint what may change; the rest stays as it is. The result has image 1's size."
        : "Image 1 is too large to paint on; give one of 16 megapixels at most.");
      [canvas.width, canvas.height] = mask.ready
        ? [shown.naturalWidth, shown.naturalHeight] : [1, 1];
      drawMask();
    };
    shown.onerror = () => hint("The browser can't show image 1; give a PNG, JPEG or WebP file.");
    hint("Loading image 1");
    shown.src = image.url;
  }
  function drawStroke(context, {erase, radius, points}, from) {
    const {width, height} = context.canvas, long = Math.max(width, height);
    context.globalCompositeOperation = erase ? "destination-out" : "source-over";
    context.fillStyle = context.strokeStyle = "#e11d48";
    context.lineWidth = 2 * radius * long;
    context.lineCap = context.lineJoin = "round";
    context.beginPath();
    const part = points.slice(Math.max(0, from - 1));
    if (part.length === 1) {  // a line to where it begins is none
      context.arc(part[0][0] * width, part[0][1] * height, radius * long, 0, 2 * Math.PI);
      context.fill();
      return;
    }
    part.forEach(([x, y], i) => context[i ? "lineTo" : "moveTo"](x * width, y * height));
    context.stroke();
  }
  function drawMask() {
    mask.sent = null;
    if (!by("mask-canvas")) return;
    const context = by("mask-canvas").getContext("2d");
    context.clearRect(0, 0, context.canvas.width, context.canvas.height);
    mask.strokes.forEach((stroke) => drawStroke(context, stroke, 0));
  }
  function begin(x, y) {
    mask.strokes.push({erase: mask.erase, radius: brush(), points: [[x, y]]});
    drawStroke(by("mask-canvas").getContext("2d"), mask.strokes.at(-1), 0);
    mask.sent = null;
  }
  function goOn(x, y) {
    const stroke = mask.strokes.at(-1);
    stroke.points.push([x, y]);
    drawStroke(by("mask-canvas").getContext("2d"), stroke, stroke.points.length - 1);
    mask.sent = null;
  }
  function placeOf(event) {
    const box = by("mask-canvas").getBoundingClientRect();
    return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
  }
  function showCursor() {
    const cursor = by("mask-cursor"), box = by("mask-canvas").getBoundingClientRect();
    const size = 2 * brush() * Math.max(box.width, box.height);
    cursor.hidden = false;
    Object.assign(cursor.style, {left: `${mask.x * 100}%`, top: `${mask.y * 100}%`,
      width: `${size}px`, height: `${size}px`});
  }
  async function maskFile() {
    const canvas = by("mask-canvas");
    if (!canvas || !mask.ready || !mask.strokes.some((stroke) => !stroke.erase)) return null;
    if (mask.sent) return mask.sent;
    const whole = document.createElement("canvas");
    [whole.width, whole.height] = [canvas.width, canvas.height];
    const context = whole.getContext("2d");
    context.drawImage(canvas, 0, 0);
    context.globalCompositeOperation = "source-in";
    context.fillStyle = "#fff";
    context.fillRect(0, 0, whole.width, whole.height);
    context.globalCompositeOperation = "destination-over";
    context.fillStyle = "#000";
    context.fillRect(0, 0, whole.width, whole.height);
    const form = new FormData();
    form.append("files", await new Promise((done) => whole.toBlob(done, "image/png")), "mask.png");
    const api = new URL("gradio_api/upload", document.baseURI.split(/[?#]/)[0]);
    const answer = await fetch(api, {method: "POST", body: form});
    if (!answer.ok) throw new Error("the mask was not taken");
    return mask.sent = file((await answer.json())[0]);
  }
  async function send(values) {
    say("");
    values[at("mask")] = await maskFile();
    return values;
  }

  // Keys, clicks, and what the server refuses

  function toTheTop() {
    const field = document.querySelector("#prompt textarea");
    field?.focus({preventScroll: true});
    by("prompt")?.scrollIntoView({block: "start"});
  }
  document.addEventListener("keydown", (event) => {
    const inPrompt = event.target.closest?.("#prompt");
    if (inPrompt && event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      // what was typed last reaches Gradio first
      setTimeout(() => by("generate").click());
    }
    if (event.target.id !== "mask-canvas") return;
    const step = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]};
    if (step[event.key]) {
      const [x, y] = step[event.key], length = Math.max(brush(), .01);
      mask.x = Math.min(1, Math.max(0, mask.x + x * length));
      mask.y = Math.min(1, Math.max(0, mask.y + y * length));
    } else if (event.key === " ") begin(mask.x, mask.y);
    else return;
    event.preventDefault();
    showCursor();
  });
  document.addEventListener("focusin", (event) => {
    if (event.target.id === "mask-canvas" && event.target.matches(":focus-visible")) showCursor();
  });
  document.addEventListener("focusout", (event) => {
    if (event.target.id === "mask-canvas") by("mask-cursor").hidden = true;
  });
  document.addEventListener("pointerdown", (event) => {
    if (event.target.id !== "mask-canvas" || event.button) return;
    event.target.setPointerCapture(event.pointerId);
    begin(...placeOf(event));
  });
  document.addEventListener("pointermove", (event) => {
    if (event.target.id === "mask-canvas" && event.target.hasPointerCapture(event.pointerId))
      goOn(...placeOf(event));
  });
  document.addEventListener("click", (event) => {
    const example = event.target.closest?.("[data-example]");
    if (example) {
      page.chosen = Number(example.dataset.example);
      by("do-fill").click();
    }
    if (event.target.id === "mask-erase") {
      mask.erase = !mask.erase;
      event.target.setAttribute("aria-pressed", mask.erase);
    } else if (event.target.id === "mask-undo") {
      mask.strokes.pop();
      drawMask();
    } else if (event.target.id === "mask-clear") {
      mask.strokes = [];
      drawMask();
    }
  });
  // Gradio names some parts for screen readers in a way that they do not read
  let due = false;
  function mend() {
    due = false;
    const editor = by("mask-editor");
    if (editor && !("ready" in editor.dataset)) showImage();
    for (const title of document.querySelectorAll("button.label-wrap"))
      title.setAttribute("aria-expanded", title.classList.contains("open"));
    for (const empty of document.querySelectorAll("div.empty[aria-label]:not([role])"))
      empty.setAttribute("role", "img");
    for (const list of document.querySelectorAll("[role=listbox]:not([aria-label])"))
      list.setAttribute("aria-label", "Choices");
    // what Gradio itself has to say, such as of a file that is too large
    for (const told of document.querySelectorAll("[data-testid=toast-text]:not([data-said])")) {
      told.dataset.said = "";
      say(told.textContent);
    }
    const shown = document.querySelector("#result img:not([data-named])");
    if (shown) {
      shown.dataset.named = "";
      shown.alt = "The picture";
    }
    for (const number of [1, 2, 3]) {
      const given = document.querySelector(`#image-${number} img:not([data-named])`);
      if (given) {
        given.dataset.named = "";
        given.alt = `Image ${number}`;
      }
    }
  }
  new MutationObserver(() => {
    if (!due) requestAnimationFrame(mend);
    due = true;
  }).observe(document, {childList: true, subtree: true, attributeFilter: ["class"]});
  // a refusal names the way out: it is shown beside Generate
  const ask = window.fetch;
  window.fetch = async (...what) => {
    const answer = await ask(...what);
    const own = String(answer.url).includes("/gradio_api/");
    if (!answer.ok && own && !answer.url.includes("/gradio_api/file="))
      answer.clone().json().then((told) => say(told.detail || ""), () => {});
    return answer;
  };

  const page = {keep, restore, uploaded, cleared, made, asInput, settings, maskOf, send, toTheTop,
    chosen: 0, restored: false};
  return page;
})();
window.omnigen = omnigen;
